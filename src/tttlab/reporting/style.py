"""The look that all pages share: colours by day and by night, type, and tables."""

from typing import TYPE_CHECKING

from tttlab.reporting import plots

if TYPE_CHECKING:
    from markupsafe import Markup

_BASE = """\
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; padding-top: .9rem; border-top: 1px solid
  var(--grid); scroll-margin-top: .5rem; }
h3 { font-size: .9375rem; margin: 1.5rem 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 48rem; }
.note, figcaption, .small, nav { color: var(--muted); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0 0 1.4rem; }
nav a { color: inherit; text-decoration: underline; text-decoration-color: var(--grid);
  text-underline-offset: .25em; }
nav a:hover { color: var(--ink); text-decoration-color: currentColor; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem;
  line-height: 1.5; font-variant-numeric: tabular-nums; }
th, td { padding: .375rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px
  solid var(--grid); vertical-align: baseline; }
th:first-child, td:first-child, .left { text-align: left; }
figure { margin: 1rem 0 1.75rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; font-size: .9375rem; }
dl { display: grid; grid-template-columns: minmax(8rem, 11rem) 1fr; gap: .5rem 1.25rem;
  max-width: 52rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; }
"""


def base_style() -> "Markup":
    """Write the rules with which the style of every page begins."""
    from markupsafe import Markup

    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in theme.items())
        for theme in themes().values()
    )
    by_day = f":root {{ color-scheme: light dark; {light} }}"
    by_night = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    on_paper = "@media print { :root { color-scheme: light; } }"
    return Markup("\n".join([by_day, by_night, on_paper, _BASE]))


def themes() -> dict[str, dict[str, str]]:
    """Give the colours of the light and the dark page by name."""
    light = {
        "paper": plots.PAPER,
        "ink": plots.INK,
        "muted": "#5f5f69",
        "grid": plots.GRID,
        "wash": "#f6f6f8",
        "gain": plots.GAIN,
        "loss": plots.LOSS,
    }
    dark = {
        "paper": "#15161a",
        "ink": "#e6e6ea",
        "muted": "#9b9ba6",
        "grid": "#34353d",
        "wash": "#1e1f25",
        "gain": plots.DARK_GAIN,
        "loss": plots.DARK_LOSS,
    }
    for number, (light_color, dark_color) in enumerate(zip(plots.LIGHT, plots.DARK, strict=True)):
        light[f"run-{number}"], dark[f"run-{number}"] = light_color, dark_color
    return {"light": light, "dark": dark}
