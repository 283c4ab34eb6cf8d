"""What the documents show is run as it stands."""

import re

import networks
import pytest
import torch
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


@pytest.fixture
def entropy(tmp_path, monkeypatch):
    (code,) = code_blocks("docs/methods.md")
    (tmp_path / "entropy.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(tttlab.methods, "__path__", [*tttlab.methods.__path__, str(tmp_path)])
    return tmp_path


def test_the_documents_example_is_a_method(entropy):
    assert declared("entropy", entropy).settings.model_validate({"temperature": 2.0}).temperature == 2.0
    method = load_method("entropy", {"temperature": 2.0})
    network, _ = networks.source_statistics("resnet")
    images = networks.images(3, seed=60).double()
    result = adapt(network, images, method, InnerLoop(steps=5, lr=1e-2, trainable="norm"))
    probabilities = (result.source_logits / 2).softmax(-1)
    expected = torch.distributions.Categorical(probabilities).entropy()
    torch.testing.assert_close(result.losses[:, 0], expected)
    assert (result.losses[:, -1] < result.losses[:, 0]).all()


def test_documents_name_no_missing_file():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
