"""The documentation as a site: pages and methods are reached, nothing is fetched elsewhere."""

import html
import re
from dataclasses import replace

import pytest
import torch
from ruamel.yaml import YAML

from tests.test_docs import code_blocks, text_of
from tools.diagrams import DOCS, FOLDER, drawing_of, sources
from tools.stage_code import ROOT
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.methods.__main__ import rows
from tttlab.methods.none import NoAdaptation

PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FIGURE = r"[+−]?[\d.]+ \[[+−]?[\d.]+, [+−]?[\d.]+\]"
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # single beside double precision
METHODS = [row["method"] for row in rows() if " " not in row["method"]]


def in_navigation(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in entry for page in in_navigation(_inside(part))]


def _inside(part):
    return part if isinstance(part, str) else next(iter(part.values()))


def navigation() -> list[str]:
    nav = re.search(r"^nav:\n(.*?)^not_in_nav", text_of("mkdocs.yml"), re.DOTALL | re.MULTILINE)
    return in_navigation(YAML(typ="safe").load(nav[1]))


def test_every_page_is_in_the_navigation_once():
    made = {"changelog.md", "contributing.md", "source/params.yaml.md"}
    assert sorted(navigation()) == sorted({*PAGES, *made})


@pytest.mark.parametrize(
    ("page", "named"),
    [
        ("which_method.md", r"^\| \[.*?`(\w+)`.*?\]\(methods\.md#"),
        ("methods.md", r"^\| \[.*?`(\w+)`.*?\]\(#"),
        ("api/methods.md", r"^::: tttlab\.methods\.(\w+)$"),
    ],
)
def test_every_method_has_its_place(page, named):
    found = set(re.findall(named, text_of(f"docs/{page}"), re.MULTILINE))
    assert found - {"mixed", "shrink"} == set(METHODS)  # those two are policies of `none`


def test_every_command_has_its_place():
    page = text_of("docs/commands.md")
    targets = re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE)
    commands = re.findall(r'add_parser\(\s*"(\w+)"', text_of("src/tttlab/workflow/cli.py"))
    assert {"repro", "docs"} <= set(targets)
    assert "predict" in commands
    assert not [name for name in targets if f"`make {name}`" not in page]
    assert not [name for name in commands if not re.search(rf"^\| `{name}\b", page, re.MULTILINE)]


def test_every_diagram_has_the_drawing_of_its_source():
    """The words of the boxes, which differ from diagram to diagram, stand in the drawing."""
    diagrams = sources()
    assert len(diagrams) >= 4
    assert {drawing_of(source) for source in diagrams} == set(FOLDER.glob("*.svg"))
    for source in diagrams:
        drawn = html.unescape(re.sub(r"<[^>]+>", " ", drawing_of(source).read_text("utf-8")))
        labels = re.sub(r"<[^>]+>", " ", " ".join(re.findall(r'"([^"]+)"', source)))
        assert set(labels.split()) <= set(drawn.split())


def test_figures_in_the_summaries_are_those_of_the_results():
    """Every gain with its interval on a page for reading stands in a table of results.md."""

    def plain(text: str) -> str:
        return re.sub(r"[\s|*]+", " ", text)

    results, found = plain(text_of("docs/results.md")), 0
    for page in ("which_method.md", "summary.md", "training_or_not.md"):
        for figure in re.findall(FIGURE, plain(text_of(f"docs/{page}"))):
            assert figure in results, f"{page}: {figure}"
            found += 1
    assert found >= 10


def test_the_ablations_name_settings_that_exist():
    params = YAML(typ="safe").load(text_of("params.yaml"))
    page = text_of("docs/tutorials/ablation.md")
    keys = re.findall(r"-S '?([\w.]+)=", page)
    assert len(keys) >= 10
    for key in keys:
        section = params
        for name in key.removesuffix(".search").split("."):
            section = section[name]


def test_the_tutorials_python_runs_and_computes_what_it_says():
    torch.manual_seed(0)
    namespace = {
        "test_images": torch.randn(3, 3, 64, 64),
        "source_images": torch.randn(12, 3, 64, 64),
        "labels": torch.tensor([0, 1, 2]),
    }
    first, second, third = code_blocks("docs/tutorials/python.md")
    exec(first.replace("pretrained=True", "pretrained=False"), namespace)
    network, images = namespace["network"], namespace["test_images"]
    control = InnerLoop(normalisation="mixed", prior=0.1)
    averaged = replace(control, average=16, augmentation=Augmentation(flip=True))
    expected = adapt(network.double(), images.double(), NoAdaptation(), averaged)
    network.float()
    assert not torch.allclose(namespace["result"].logits, namespace["result"].source_logits)
    torch.testing.assert_close(namespace["result"].logits.double(), expected.logits, **CLOSE)
    exec(second, namespace)
    trained = namespace["trained"]
    untrained = adapt(network, images, NoAdaptation(), control)
    torch.testing.assert_close(trained.logits_at[:, 0], untrained.logits)
    torch.testing.assert_close(trained.logits_at[:, 1], trained.logits)
    exec(third, namespace)
    shut = ~namespace["opened"]
    result = namespace["result"]
    assert torch.equal(result.logits[shut], result.source_logits[shut])


def test_the_corruptions_example_runs():
    (code,) = code_blocks("docs/corruptions.md")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8).numpy()
    namespace = {"image": pixels[0], "pixels": pixels, "image_ids": ["a", "b"]}
    exec(code, namespace)
    assert namespace["foggy"].shape == (32, 32, 3)
    assert namespace["shifted"].shape == pixels.shape


@pytest.fixture
def hooks():
    pytest.importorskip("mkdocs", reason="MkDocs is not installed; `make docs` installs it")
    from tools import site_hooks

    return site_hooks


def test_links_that_leave_the_pages_lead_to_what_they_name(hooks):
    text = "[a](../src/x.py) [b](methods.md#memo) [c](../README.md) [d](https://e.org/../f) [g](#h)"
    assert hooks.links_on_the_site(text, "design.md") == (
        "[a](source/src/x.py.md) [b](methods.md#memo) [c](index.md) [d](https://e.org/../f) [g](#h)"
    )
    deeper = hooks.links_on_the_site("[a](../../params.yaml) [b](../runs.md)", "tutorials/x.md")
    assert deeper == "[a](../source/params.yaml.md) [b](../runs.md)"
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        moved = hooks.links_on_the_site(hooks.from_the_root(name), hooks.PAGES[name])
        for target, _ in hooks.LINK.findall(moved):
            shown = target.removeprefix("source/").removesuffix(".md")
            assert (DOCS / target).exists() or (ROOT / shown).exists(), target


def test_intervals_stay_whole_in_tables_and_code_stays_as_it_is(hooks):
    code = "```yaml\nsearch: [1.0, 4.0]\n```\n\nbetween [0.1, 0.3]\n"
    row = "| `memo` | +4.2 [+3.0, +5.3] | [−0.2, 0.0] |"
    kept = row.replace(", ", ",\N{NO-BREAK SPACE}")
    assert hooks.with_whole_intervals(f"{row}\n\n{code}") == f"{kept}\n\n{code}"


@pytest.mark.parametrize(
    "foreign",
    [
        '<script async src="https://cdn.example/x.js"></script>',
        "<link rel='stylesheet' href='//fonts.example/x.css'>",
        '<img alt="" src="http://badge.example/x.svg">',
        '<iframe src="https://video.example/x"></iframe>',
    ],
)
def test_a_page_that_asks_another_host_is_refused(hooks, foreign):
    class Page:
        class file:
            src_uri = "x.md"

    fine = '<a href="https://example.org">paper</a><script src="assets/x.js"></script>'
    assert hooks.on_post_page(fine, page=Page, config=None) == fine
    with pytest.raises(hooks.PluginError, match=r"x\.md loads from another host"):
        hooks.on_post_page(fine + foreign, page=Page, config=None)


def test_a_diagram_without_a_drawing_stops_the_build(hooks):
    page = f"```mermaid\n{sources()[0]}```\n"
    assert "<svg" in hooks.with_drawings(page, "x.md")
    with pytest.raises(hooks.PluginError, match=r"x\.md: a diagram has changed"):
        hooks.with_drawings(page.replace("flowchart", "graph"), "x.md")


def test_the_theme_and_the_styles_name_no_other_host():
    """What the site brings itself; the pages are looked at when they are built."""
    settings = text_of("mkdocs.yml")
    assert re.search(r"^  font: false", settings, re.MULTILINE)
    for path in [*DOCS.glob("assets/*"), *FOLDER.glob("*.svg")]:
        text = path.read_text("utf-8")
        loaded = re.findall(
            r"""(?:\bsrc=|\bhref=|url\(|@import|import\()\s*["']?(https?:)?//""", text
        )
        assert not loaded, path.name
