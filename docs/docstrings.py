"""The little reStructuredText of our docstrings as Markdown, for the pages of losses and for the reference."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Markdown as GitHub reads it: formulas in fences named ``math``, or between ``$` `` and `` `$``."""

    def block(match: re.Match[str]) -> str:
        return "\n```math\n" + inspect.cleandoc(match[1] or match[2]).strip() + "\n```\n"

    text = text.replace("``", "`")
    text = re.sub(r"\n\.\. math::(?: (.+)\n|\n((?:[ ]{4}.*\n|\n(?=[ ]{4}))+))", block, text + "\n")
    text = re.sub(r":math:`([^`]*)`", lambda m: f"$`{' '.join(m[1].split())}`$", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.strip()


class Docstrings(griffe.Extension):
    """Every docstring as Markdown, its examples in fences or under the heading that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = to_markdown(inspect.cleandoc(obj.docstring.value))
            text = re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE | re.DOTALL)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
