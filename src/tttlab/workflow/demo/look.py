"""How the demo's page looks: the colours of all figures, and nothing from another host."""

from tttlab.reporting.plots import DARK, GRID, INK, LIGHT, MUTED

_SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
FONTS = {"font": _SYSTEM, "font_mono": ("ui-monospace", "Menlo", "Consolas", "monospace")}
# What the browser must not do, whatever Gradio's own page may ask for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self' ws: data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'"
)


def _colours(palette: tuple[str, ...], ink: str, muted: str, grid: str) -> str:
    runs = "".join(f"--run-{number}: {color}; " for number, color in enumerate(palette))
    return f"{runs}--ink: {ink}; --muted: {muted}; --grid: {grid};"


CSS = (
    f":root, .gradio-container {{ {_colours(LIGHT, INK, MUTED, GRID)} }}\n"
    f".dark, .dark .gradio-container {{ {_colours(DARK, '#ececf1', '#a3a3ad', '#3b3b44')} }}\n"
    """
.gradio-container, .gradio-container > *, .gradio-container main { max-width: 1240px !important;
  margin: 0 auto !important; padding: 0 !important; width: 100%; }
.gradio-container { padding: 16px !important; }
.gradio-container input[role=listbox] { text-overflow: ellipsis; padding-right: 24px; }
.html-container { padding: 0 !important; }
.answer { display: flex; flex-wrap: wrap; gap: 14px 28px; align-items: center; }
.figures { display: flex; align-items: center; gap: 12px; }
.answer figure { margin: 0; text-align: center; }
.answer figure img { width: 168px; height: 168px; border-radius: 6px; display: block; }
.answer figure.small img { width: 84px; height: 84px; }
.answer figcaption { color: var(--muted); font-size: .8rem; margin-top: 3px; }
.answer .arrow { color: var(--muted); font-size: 1.4rem; padding-bottom: 18px; }
img.crisp, .crisp img { image-rendering: pixelated; }
.cards { display: flex; gap: 12px; flex: 2 1 300px; max-width: 480px; }
.card { flex: 1 1 0; padding: 10px 14px; border-radius: 8px; min-width: 0;
  background: color-mix(in srgb, var(--grid) 28%, transparent); color: var(--ink);
  border-top: 5px solid var(--muted); }
.card.adapted_ { border-top-color: var(--run-0); }
.card small, .card .confidence { display: block; color: var(--muted); font-size: .9rem; }
.card strong { display: block; font-size: 2.4rem; line-height: 1.25; overflow-wrap: anywhere; }
.card i, td i { font-style: normal; }
.right i, td i[title=right] { color: var(--run-2); }
.wrong i, td i[title=wrong] { color: var(--run-1); }
.said { margin: 0; color: var(--ink); font-size: 1rem; flex: 1 1 240px; }
.said span { display: block; }
.panel { border: 1px solid var(--grid); border-radius: 8px; padding: 10px 14px 12px; }
.panel h3 { margin: 0 0 8px; font-size: 1rem; color: var(--ink); font-weight: 650; }
.panel h4 { margin: 8px 0 4px; font-size: .8rem; color: var(--muted); font-weight: 500; }
.note { color: var(--muted); font-size: .82rem; font-weight: 400; margin: 6px 0 0; }
.legend { margin: 0 0 6px; font-size: .82rem; color: var(--muted); }
.legend span { margin-right: 14px; }
.legend i { display: inline-block; width: 14px; height: 8px; margin-right: 5px; border-radius: 2px;
  background: var(--muted); }
.legend .adapted_ i { background: var(--run-0); }
.class { display: flex; align-items: center; gap: 8px; padding: 2px 0; color: var(--ink); }
.class > span { flex: none; width: calc(var(--label) + 1.3em); max-width: 34%; text-align: right;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.class.truth > span { font-weight: 700; color: var(--run-2); }
.class.truth > span::before { content: "✓ "; }
.class > div { flex: 1; border-left: 1px solid var(--grid); padding-right: 52px; }
.bar { display: flex; align-items: center; height: 13px; white-space: nowrap; }
.bar i { flex: none; height: 10px; border-radius: 0 3px 3px 0; background: var(--muted);
  min-width: 1px; }
.bar.adapted_ i { background: var(--run-0); }
.bar b { font-weight: 400; font-size: .75rem; line-height: 13px; padding-left: 5px;
  color: var(--muted); font-variant-numeric: tabular-nums; }
.chart { display: flex; gap: 8px; }
.chart .y { width: 42px; flex: none; display: flex; flex-direction: column; text-align: right;
  justify-content: space-between; font-size: .72rem; color: var(--muted); }
.plot { position: relative; flex: 1; height: 92px; border-left: 1px solid var(--grid);
  border-bottom: 1px solid var(--grid); min-width: 0; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot polyline { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke;
  stroke: currentColor; }
.dot { position: absolute; width: 7px; height: 7px; border-radius: 50%; margin: -3.5px 0 0 -3.5px;
  background: currentColor; }
.names { position: relative; width: 54px; margin-left: 0; flex: none; font-size: .78rem; }
.names span { position: absolute; left: 0; transform: translateY(-50%); white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; max-width: 100%; }
.line-0 { color: var(--run-2); } .line-1 { color: var(--run-1); } .line-2 { color: var(--run-3); }
.line-3 { color: var(--run-4); } .line-4 { color: var(--run-5); } .loss { color: var(--run-0); }
.ticks { display: flex; justify-content: space-between; margin: 2px 62px 0 50px; }
.ticks span { font-size: .75rem; color: var(--muted); width: 0; display: flex;
  justify-content: center; white-space: nowrap; }
.ticks span:first-child { justify-content: flex-start; transform: translateY(15px); }
.note.axis { text-align: center; margin: 0; }
.all-views { display: flex; flex-wrap: wrap; gap: 8px 18px; }
.views { display: flex; gap: 4px; align-items: center; }
.views small { color: var(--muted); font-size: .75rem; margin-right: 2px; }
.views img { width: 46px; height: 46px; border-radius: 4px; }
.scale { position: relative; padding-top: 20px; }
.scale-row { display: flex; align-items: center; gap: 10px; }
.scale-row > span { width: 116px; flex: none; text-align: right; font-size: .82rem;
  line-height: 1.1; color: var(--muted); }
.track { position: relative; flex: 1; height: 26px; border-bottom: 1px solid var(--grid); }
.band { position: absolute; top: 8px; height: 11px; border-radius: 6px; opacity: .5; }
.band.source { background: var(--run-2); } .band.shift { background: var(--run-1); }
.median { position: absolute; top: 6px; height: 15px; width: 3px; margin-left: -1.5px; }
.median.source { background: var(--run-2); } .median.shift { background: var(--run-1); }
.track .dot { top: 13px; color: var(--run-1); opacity: .55; }
.scale-row.image > span { color: var(--ink); font-weight: 650; }
.mark { position: absolute; top: 6px; width: 15px; height: 15px; margin-left: -7.5px;
  background: var(--run-0); transform: rotate(45deg); border-radius: 2px; }
.mark-label { position: absolute; top: 3px; padding-left: 14px; color: var(--run-0);
  font-size: .85rem; }
.over { position: absolute; left: 126px; right: 0; top: 0; bottom: 22px; pointer-events: none; }
.gate { position: absolute; top: 16px; bottom: 0; border-left: 2px dashed var(--ink); }
.gate-label { position: absolute; top: 0; transform: translateX(-50%); font-size: .75rem;
  white-space: nowrap; color: var(--ink); font-weight: 500; }
.scale-ticks { position: relative; flex: 1; height: 18px; }
.scale-ticks span { position: absolute; transform: translateX(-50%); font-size: .75rem;
  color: var(--muted); }
.panel table, .panel thead, .panel tr { border: 0 !important; }
.panel table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; color: var(--ink); margin: 0; }
.panel th, .panel td { text-align: right; padding: 4px 6px; border: 0;
  border-bottom: 1px solid var(--grid); font-weight: 400; white-space: nowrap;
  background: transparent; color: var(--ink); }
.panel th:first-child { text-align: left; white-space: normal; }
.panel thead th { color: var(--muted); font-size: .78rem; }
.panel th small { color: var(--muted); font-size: .75rem; margin-left: 8px; }
.panel tr.chosen th, .panel tr.chosen td { font-weight: 700; }
.panel tr.chosen { background: color-mix(in srgb, var(--run-0) 12%, transparent); }
@media (max-width: 640px) {
  .gradio-container { padding: 10px !important; }
  .answer figure img { width: 128px; height: 128px; }
  .answer figure.small img { width: 72px; height: 72px; }
  .cards { flex-basis: 100%; max-width: none; }
  .scale-row > span { width: 84px; } .over { left: 94px; }
  .panel th small { display: block; margin: 0; }
}
"""
)
