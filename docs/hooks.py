"""What the site of mkdocs.yml has besides docs/: pages from outside it, and formulas that browsers draw themselves."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    "configs/paper/README.md",
    "configs/reproduce/README.md",
    "configs/cluster/slurm.sh",
    "configs/cluster/torchrun.sh",
]


def drawn(tex: str, display: str) -> str:
    """TeX as MathML. The names of functions get the space that TeX leaves after them."""
    found = convert(tex.replace(r"\_", "_"), display=display)  # which takes what is escaped within \text as it stands
    return re.sub(r"<mi>[a-z]{2,}</mi>", r'<mrow>\g<0><mspace width="0.17em" /></mrow>', found)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Formulas in fences of their own become MathML."""
    math = {"name": "math", "class": "", "format": lambda tex, *_, **__: drawn(tex, "block")}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [math]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in what lies outside docs/; the README of the project stands for the list of pages in docs/README.md."""
    files.remove(files.src_uris["README.md"])
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site, whose root is docs/."""
    here = page.file.src_uri
    folder = (ROOT if here in OUTSIDE else ROOT / "docs") / Path(here).parent

    def moved(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve().relative_to(ROOT).as_posix().removeprefix("docs/")
        return f"]({os.path.relpath(target, Path(here).parent)}"

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)", moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas within a line, which GitHub has between ``$` `` and `` `$``, become MathML."""
    return re.sub(r"\$<code>(.*?)</code>\$", lambda match: drawn(unescape(match[1]), "inline"), html)
