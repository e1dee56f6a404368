"""The documentation's site builds without a warning, and is read without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """What a built page loads, where its links lead, and what they may lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or "")
        if tag == "a":
            self.links += [link for link in [given.get("href")] if link]
        else:
            self.loads += [found for found in [given.get("src"), given.get("href")] if found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 30
    return found


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]):
    for path, page in pages.items():
        assert page.loads, path
        for target in page.loads:
            assert not re.match(r"(\w+:)?//", target), f"{path.name} loads {target}"
            assert (path.parent / target).exists(), f"{path.name} loads {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def test_links_between_pages_lead_somewhere(pages: dict[Path, Page]):
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if target.startswith("https://"):
                continue
            found = (path.parent / target).resolve() if target else path
            assert found.is_file(), f"{path.name} links to {link}"
            assert not anchor or anchor in pages[found].anchors, f"{path.name} links to {link}"


def test_every_formula_is_drawn(site: Path):
    for source in (ROOT / "docs" / "losses").glob("*.md"):
        text = source.read_text()
        built = (site / "losses" / source.with_suffix(".html").name.replace("README", "index")).read_text()
        assert built.count("<math ") == text.count("```math") + text.count("$`"), source.name
    for path in site.rglob("*.html"):
        built = path.read_text()
        drawn = "".join(re.findall(r"<math .*?</math>", built, re.DOTALL))
        assert "\\" not in drawn, f"{path.name}: what begins with a backslash was not understood"
        assert not re.search(r"\$<code>|:math:|\.\. math::", built), path.name


def test_the_reference_has_all_public_names(pages: dict[Path, Page]):
    for name in ("lit_grpo.losses", "lit_grpo.data", "lit_grpo.engines", "lit_grpo.metrics", "callbacks"):
        page = next(page for path, page in pages.items() if path.match(f"reference/{name.split('.')[-1]}.html"))
        for public in import_module(name).__all__:
            assert any(anchor.startswith(f"{name}.") and anchor.endswith(f".{public}") for anchor in page.anchors), (
                public
            )
