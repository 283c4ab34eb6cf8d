"""Draw the Mermaid diagrams of docs/ as SVG, which the site shows in place of Mermaid's scripts.

A site that draws diagrams in the reader's browser fetches three megabytes of script from another
host. So they are drawn once, here, and kept in docs/diagrams by the hash of their source; the
site's build stops where one is missing. After changing a diagram:

    npm pack mermaid@11.16.0 && tar xzf mermaid-11.16.0.tgz package/dist/mermaid.min.js
    uv run python tools/diagrams.py package/dist/mermaid.min.js --browser chromium
"""

import argparse
import hashlib
import html
import json
import re
import subprocess
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = DOCS / "diagrams"
FENCE = re.compile(r"^```mermaid\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)

# Colours are left to the page, which is light or dark.
STYLE = """
.node rect, .node polygon, .node path { fill: var(--diagram-fill) !important;
  stroke: var(--diagram-line) !important; }
.flowchart-link { stroke: var(--diagram-line) !important; }
.marker, .arrowMarkerPath { fill: var(--diagram-line) !important;
  stroke: var(--diagram-line) !important; }
.nodeLabel, .nodeLabel p { color: var(--diagram-text) !important; }
"""

PAGE = """<!doctype html><meta charset="utf-8"><body><script>{mermaid}</script><script>
mermaid.initialize({settings});
mermaid.render({name}, {source}).then((drawn) => {{
  document.body.innerHTML = "<textarea></textarea>";
  document.querySelector("textarea").textContent = drawn.svg;
}});
</script>"""


def drawing_of(source: str) -> Path:
    """Say where the drawing of a diagram lies."""
    return FOLDER / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def sources() -> list[str]:
    """List the diagrams of all pages."""
    pages = sorted(DOCS.rglob("*.md"))
    return [source for page in pages for source in FENCE.findall(page.read_text(encoding="utf-8"))]


def draw(source: str, mermaid: str, browser: str) -> str:
    """Have a browser without a window draw one diagram."""
    settings = {
        "startOnLoad": False,
        "theme": "base",
        "themeCSS": STYLE,
        "fontFamily": "sans-serif",
        "flowchart": {"padding": 10, "nodeSpacing": 20, "rankSpacing": 30},
    }
    name = f"diagram-{drawing_of(source).stem}"
    page = PAGE.format(
        mermaid=mermaid,
        settings=json.dumps(settings),
        name=json.dumps(name),
        source=json.dumps(source),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
        command = [browser, *options, "--dump-dom", path.as_uri()]
        dom = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"<textarea>(.*?)</textarea>", dom, flags=re.DOTALL)
    if not found:
        raise SystemExit(f"error: the browser drew nothing of\n{source}")
    return html.unescape(found[1])


def main() -> None:
    """Draw what has no drawing, and remove what belongs to no diagram."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mermaid", type=Path, help="mermaid.min.js")
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome")
    parser.add_argument("--all", action="store_true", help="draw those anew that are there")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    mermaid = arguments.mermaid.read_text(encoding="utf-8")
    wanted = {drawing_of(source): source for source in sources()}
    for path, source in wanted.items():
        if arguments.all or not path.exists():
            path.write_text(draw(source, mermaid, arguments.browser) + "\n", encoding="utf-8")
            print(path)
    for path in set(FOLDER.glob("*.svg")) - set(wanted):
        path.unlink()


if __name__ == "__main__":
    main()
