"""What MkDocs does here beside its own: one set of pages serves the repository and the site.

- Links that leave docs/ (``../settings/folders.yaml``) lead to a page that shows that file.
- CHANGELOG.md and CONTRIBUTING.md are pages; README.md stands for the site's first page.
- Mermaid diagrams are the drawings of docs/diagrams, see `tools.diagrams`.
- The report of the last run in this folder, if there is one, is the example report.
- A page that would load anything from another host stops the build.
"""

import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # MkDocs runs this file by its path

from tools.diagrams import FENCE, drawing_of  # noqa: E402

LEGIBLE = 0.6  # of a drawing's own size; a narrower page scrolls it
EXAMPLE, REPORT = "example_report.md", "last_report.html"
LAST_REPORT = ROOT / "outputs" / "report.html"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
ALWAYS_SHOWN = ("params.yaml", "CITATION.cff", "LICENSE")
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".toml": "toml"}
TABLE_ROW = re.compile(r"^\|.*$", flags=re.MULTILINE)
INTERVAL = re.compile(r"\[([+−]?[\d.]+), ([+−]?[\d.]+)\](?!\()")
FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*\bhref=["'](?:https?:)?//"""
)


def place_of(target: str, page: str) -> str | None:
    """Say which file of the project a link leads to, or None if it leads into docs/.

    Args:
        target: the link, relative to its page.
        page: the page, relative to docs/.
    """
    parts: list[str] = []
    for part in [*PurePosixPath("docs", page).parent.parts, *PurePosixPath(target).parts]:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            return None
    return None if parts[:1] == ["docs"] else "/".join(parts)


def page_of(place: str) -> str:
    """Name the page that shows a file of the project, relative to docs/."""
    return PAGES.get(place, f"source/{place}.md")


def links_on_the_site(text: str, page: str) -> str:
    """Turn the links of a page that leave docs/ to the pages that show their targets."""
    up = "../" * (len(PurePosixPath(page).parts) - 1)

    def turned(link: re.Match[str]) -> str:
        place = place_of(link[1], page)
        return link[0] if place is None else f"{up}{page_of(place)}{link[2] or ''}"

    return LINK.sub(turned, text)


def with_whole_intervals(text: str) -> str:
    """Keep an interval in a table on one line; lists in code keep their ordinary spaces."""

    def whole(row: re.Match[str]) -> str:
        return INTERVAL.sub("[\\1,\N{NO-BREAK SPACE}\\2]", row[0])

    return TABLE_ROW.sub(whole, text)


def with_drawings(text: str, page: str) -> str:
    """Put the drawings in the place of the Mermaid diagrams."""

    def drawn(fence: re.Match[str]) -> str:
        path = drawing_of(fence[1])
        if not path.exists():
            raise PluginError(f"{page}: a diagram has changed; see tools/diagrams.py")
        svg = path.read_text(encoding="utf-8").replace("\n", " ")
        width = float(re.search(r"max-width: ([\d.]+)px", svg)[1])
        return f'<div class="diagram" style="--narrowest: {LEGIBLE * width:.0f}px">{svg}</div>'

    return FENCE.sub(drawn, text)


def shown_file(place: str) -> str:
    """Make the page that shows a file of the project."""
    path = ROOT / place
    if not path.is_file():
        raise PluginError(f"docs/ has a link to {place}, which is no file")
    language = LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8").rstrip("\n")
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {place}\n\n"
    return f"{head}~~~~ {{.{language}}}\n{text}\n~~~~\n"


def from_the_root(name: str) -> str:
    """Read a page of the project's first folder, its links as from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")

    def turned(link: re.Match[str]) -> str:
        target = link[1]
        inside = target.removeprefix("docs/")
        return (inside if inside != target else f"../{target}") + (link[2] or "")

    return LINK.sub(turned, text)


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    shown = set(ALWAYS_SHOWN)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, PAGES[name], content=from_the_root(name)))
    for page in files.documentation_pages():
        for target, _ in LINK.findall(page.content_string):
            place = place_of(target, page.src_uri)
            if place is not None and place not in PAGES:
                shown.add(place)
    for place in sorted(shown):
        files.append(File.generated(config, page_of(place), content=shown_file(place)))
    if LAST_REPORT.exists():
        files.append(File.generated(config, REPORT, abs_src_path=str(LAST_REPORT)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make a page of the repository one of the site."""
    name = page.file.src_uri
    if name.startswith("source/"):
        return markdown
    if name == EXAMPLE and LAST_REPORT.exists():
        markdown += f"\n[Open the whole report]({REPORT}){{ .md-button }}\n"
    return with_drawings(with_whole_intervals(links_on_the_site(markdown, name)), name)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would tell another host who reads it."""
    foreign = FOREIGN.search(output)
    if foreign:
        raise PluginError(f"{page.file.src_uri} loads from another host: {foreign[0]}")
    return output
