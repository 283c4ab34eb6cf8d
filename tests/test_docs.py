"""What the documents show is run as it stands."""

import re
import sys

import contract
import networks
import pytest
import timm
import torch
from ruamel.yaml import YAML
from test_structure import ROOT

import tttlab.methods
from tttlab.adapter import InnerLoop, adapt
from tttlab.method_settings import declared
from tttlab.registry import load_method


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readmes_ten_lines_run_on_any_timm_classifier(capsys):
    (code,) = code_blocks("README.md")
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randn(count, 3, 64, 64, generator=generator) for name, count in (("source", 12), ("test", 3))}
    names = {f"{name}_images": value for name, value in images.items()}
    exec(code.replace("pretrained=True", "pretrained=False"), names)  # no download here
    assert names["result"].logits.shape == (3, 1000)
    assert "predictions changed" in capsys.readouterr().out


@pytest.fixture(params=["soft_entropy", "my_package.soft_entropy"])
def example(request, tmp_path, monkeypatch):
    """The document's file at each of the two places that it names; → what ``method`` is then."""
    (code,) = code_blocks("docs/add_a_method.md")
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "soft_entropy.py").write_text(code, encoding="utf-8")
    if "." in request.param:
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setattr(tttlab.methods, "__path__", [*tttlab.methods.__path__, str(tmp_path / "my_package")])
    yield request.param, tmp_path / "my_package"
    for name in ("my_package", "my_package.soft_entropy", "tttlab.methods.soft_entropy"):
        sys.modules.pop(name, None)


def test_the_documents_example_is_a_method(example):
    name, folder = example
    run = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    entry = YAML(typ="safe").load(run)["soft"]
    found = declared(name, folder)
    assert entry["method"] == "my_package.soft_entropy"
    assert found.settings.model_validate({"temperature": entry["temperature"]}).temperature == 2.0
    assert found.protocols == ("episodic", "online")
    method = load_method(name, {"temperature": entry["temperature"]})
    network, _ = networks.source_statistics("resnet")
    images = networks.images(3, seed=60).double()
    result = adapt(network, images, method, InnerLoop(steps=5, lr=entry["lr"], trainable=entry["trainable"]))
    probabilities = (result.source_logits / 2).softmax(-1)
    expected = torch.distributions.Categorical(probabilities).entropy()
    torch.testing.assert_close(result.losses[:, 0], expected)
    assert (result.losses[:, -1] < result.losses[:, 0]).all()


def test_the_contract_tests_take_a_method_of_another_package(monkeypatch):
    assert "my_package.soft_entropy" not in contract.names()
    monkeypatch.setenv("OWN_METHODS", "my_package.soft_entropy my_package.other")
    assert contract.names()[-2:] == ("my_package.soft_entropy", "my_package.other")
    assert "OWN_METHODS=my_package.soft_entropy" in (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")


def test_what_takes_the_place_of_torch_ttts_engines_runs():
    blocks = [code for code in code_blocks("docs/torch_ttt.md") if "torch_ttt" not in code]
    assert len(blocks) == 4
    torch.manual_seed(0)
    for code in blocks:
        names = {
            "model": timm.create_model("resnet10t", num_classes=10),
            "images": torch.rand(3, 3, 64, 64),
            "source_images": torch.rand(12, 3, 64, 64),
            "labels": torch.tensor([0, 1, 2]),
            "criterion": torch.nn.CrossEntropyLoss(),
        }
        exec(code, names)
        if "loss_ttt" in names:
            assert all(parameter.grad is not None for parameter in names["network"].parameters())
        else:
            assert names["logits"].shape == (3, 10)
            assert names["logits"].isfinite().all()


def test_every_engine_of_torch_ttt_has_its_place_in_the_table():
    """Names on the left are torch-ttt's registry, names on the right are methods that exist."""
    page = (ROOT / "docs/torch_ttt.md").read_text(encoding="utf-8")
    table = page.split("## Their nine engines")[1].split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert {name.strip("`") for name, *_ in rows if name} == {
        *("ttt", "ttt_pp", "masked_ttt", "actmad", "tent", "eata", "memo", "deyo", "ittt"),
    }  # fmt: skip
    expected = {"Engine": "episodic", "stream": "online"}
    for _, name, form, _ in rows:
        assert {expected[part.strip(" `")] for part in form.split(",")} == set(declared(name.strip("`")).protocols)


def anchors(page):
    """List the headings of a page as GitHub links to them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_name_no_missing_file_or_heading():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}#{anchor}"
