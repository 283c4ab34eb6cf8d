"""The documents' examples run as they are printed, and what the documents name exists."""

import copy
import gc
import inspect
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML

import tttlab.methods
from tests.helpers import contract, networks
from tests.methods.test_contract import LOOPS, assert_vectorised_equals_one_image_at_a_time
from tools.stage_code import ROOT
from tttlab.adaptation.adapter import InnerLoop, adapt
from tttlab.adaptation.engine import Engine
from tttlab.adaptation.method import Method
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import Augmentation
from tttlab.config.method_settings import HOOKS, declared
from tttlab.data.views import random_views
from tttlab.seeding import torch_generator


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), flags=re.DOTALL)


@pytest.mark.filterwarnings(  # timm's reader of folders leaves files to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_readmes_lines_run_on_a_folder_of_photographs(tmp_path, monkeypatch, capsys):
    """Re-normalising alone is compared with its own call, and averaging changes more."""
    code, _ = code_blocks("README.md")
    generator = np.random.default_rng(0)
    (tmp_path / "winter").mkdir()
    for number in range(3):
        pixels = generator.integers(256, size=(60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "winter" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code.replace("pretrained=True", "pretrained=False"), namespace)  # no download here
    assert namespace["winter"].shape == (3, 3, 224, 224)
    assert namespace["result"].logits.shape == (3, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d of", "n of", line) for line in lines] == [
        "0 crops: n of 3 predictions changed",
        "16 crops: n of 3 predictions changed",
    ]
    alone = namespace["adapt"](
        namespace["network"],
        namespace["winter"][:1],
        namespace["NoAdaptation"](),
        InnerLoop(normalisation="mixed", prior=0.1),
    )
    assert not torch.equal(alone.logits, alone.source_logits)
    assert not torch.allclose(alone.logits[0], namespace["result"].logits[0])
    gc.collect()


def test_the_readmes_own_method_is_one(tmp_path, monkeypatch):
    """Its loss is the entropy of the softened prediction, and falls along the steps."""
    _, code = code_blocks("README.md")
    (tmp_path / "of_readme").mkdir()
    (tmp_path / "of_readme" / "surer.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    method = load_method("of_readme.surer", {"temperature": 3.0})
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=5, lr=1e-2, trainable="norm")
    result = adapt(network, networks.images(2, seed=62).double(), method, loop)
    probabilities = (result.source_logits / 3).softmax(-1)
    expected = torch.distributions.Categorical(probabilities).entropy()
    torch.testing.assert_close(result.losses[:, 0], expected)
    assert (result.losses[:, -1] < result.losses[:, 0]).all()


def test_every_number_that_the_readme_found_stands_in_the_pages_that_it_names():
    findings = text_of("README.md").split("## What we found")[1].split("\n## ")[0]
    results = re.sub(r"[*|\s]+", " ", text_of("docs/results.md"))
    measured = re.findall(r"([+−]\d+\.\d) (\[[^\]]*\d\])", re.sub(r"\s+", " ", findings))
    assert len(measured) == 13
    for gain, interval in measured:
        assert f"{gain} {interval}" in results
    for alone in ("+10.9", "59.0", "20.9"):
        assert alone in findings
        assert alone in results
    studies = text_of("docs/when_it_helps.md")
    for alone in ("80.5", "95.7", "92.8", "1 to 3 times", "6 to 9", "20 to 90"):
        assert alone in findings
        assert alone in studies


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """A folder with the document's files, whose package can be imported."""
    folder = tmp_path / "my_package"
    folder.mkdir()
    first, second = code_blocks("docs/add_a_method.md")
    (folder / "soft_entropy.py").write_text(first, encoding="utf-8")
    (folder / "anchored_views.py").write_text(second, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in list(sys.modules):
        if name.startswith("my_package") or name == "tttlab.methods.soft_entropy":
            del sys.modules[name]


@pytest.mark.parametrize("name", ["soft_entropy", "my_package.soft_entropy"])
def test_the_documents_example_is_a_method_at_each_of_the_two_places_that_it_names(
    my_package, monkeypatch, name
):
    assert len((my_package / "soft_entropy.py").read_text(encoding="utf-8").splitlines()) <= 40
    if "." not in name:
        monkeypatch.setattr(tttlab.methods, "__path__", [*tttlab.methods.__path__, str(my_package)])
    entry = YAML(typ="safe").load(code_blocks("docs/add_a_method.md", "yaml")[0])["soft"]
    declaration = declared(name, my_package)
    settings = declaration.settings.model_validate({"temperature": entry["temperature"]})
    assert entry["method"] == "my_package.soft_entropy"
    assert settings.temperature == 2.0
    assert declaration.protocols == ("episodic", "online")
    method = load_method(name, {"temperature": entry["temperature"]})
    network, _ = networks.source_statistics("resnet")
    images = networks.images(3, seed=60).double()
    loop = InnerLoop(steps=5, lr=entry["lr"], trainable=entry["trainable"])
    result = adapt(network, images, method, loop)
    probabilities = (result.source_logits / 2).softmax(-1)
    expected = torch.distributions.Categorical(probabilities).entropy()
    torch.testing.assert_close(result.losses[:, 0], expected)
    assert (result.losses[:, -1] < result.losses[:, 0]).all()
    assert torch.equal(Engine(network, name, loop).eval()(images)[0], result.logits)


def test_the_documents_second_example_is_what_it_says(my_package):
    """Two steps, compared to a loop over images with autograd on a copy of the network."""
    module, weak, strength = "my_package.anchored_views", Augmentation(0.5, True, 0.3), 0.5
    method = load_method(module, {"num_views": 3, "strength": strength}, augmentation=weak)
    assert method.augmentation == weak
    assert declared(module).others == ("augmentation",)
    network, _ = networks.source_statistics("resnet")
    images = networks.images(2, seed=61).double()
    loop = InnerLoop(steps=2, lr=1.0, trainable="norm")
    result = adapt(network, images, method, loop, image_ids=["a", "b"])
    for name, image, losses, logits in zip("ab", images, result.losses, result.logits, strict=True):
        slow = copy.deepcopy(network)
        trained = list(select_parameters(slow, "norm").values())
        source = [value.detach().clone() for value in trained]
        expected = []
        for step in (0, 1, 1):  # the last loss is that of the last views after the last step
            views = random_views(image[None], [torch_generator(0, "views", name, step)], 3, weak)[0]
            mean = slow(views).logits.softmax(-1).mean(0)
            pairs = zip(trained, source, strict=True)
            distance = sum((value - start).square().sum() for value, start in pairs)
            loss = -(mean * mean.log()).sum() + strength * distance
            expected.append(loss.detach())
            if len(expected) < 3:
                gradients = torch.autograd.grad(loss, trained)
                with torch.no_grad():
                    for value, gradient in zip(trained, gradients, strict=True):
                        value -= loop.lr * gradient
        assert strength * distance > 1e-3
        torch.testing.assert_close(losses, torch.stack(expected))
        with torch.no_grad():
            mean = slow(torch.stack([image, image.flip(-1)])).logits.softmax(-1).mean(0)
        torch.testing.assert_close(logits, mean.log())


def test_the_document_gives_every_hook_as_it_is_called():
    calls = {}
    for line in code_blocks("docs/add_a_method.md", "text")[0].splitlines():
        hook, _, rest = line.partition("(")
        calls[hook] = rest.partition(")")[0]
    assert calls == {
        hook: ", ".join([*inspect.signature(getattr(Method, hook)).parameters][1:])
        for hook in HOOKS
    }


@pytest.mark.parametrize("name", ["my_package.soft_entropy", "my_package.anchored_views"])
def test_the_contract_tests_take_the_documents_methods(my_package, name, pytestconfig):
    assert pytestconfig.getoption("--method") == []  # the option exists
    page = text_of("docs/add_a_method.md")
    assert "uv run pytest --method my_package.soft_entropy" in page
    cases = contract.cases(name)
    assert [kind for kind, _ in cases] == ["resnet", "groupnorm", "vit"]
    assert_vectorised_equals_one_image_at_a_time(*cases[0], LOOPS[0])


@pytest.mark.slow
def test_what_takes_the_place_of_torch_ttts_engines_runs():
    blocks = [code for code in code_blocks("docs/torch_ttt.md") if "torch_ttt" not in code]
    assert len(blocks) == 5
    torch.manual_seed(0)
    for code in blocks:
        namespace = {
            "model": timm.create_model("resnet10t", num_classes=10),
            "images": torch.rand(3, 3, 64, 64),
            "source_images": torch.rand(12, 3, 64, 64),
            "labels": torch.tensor([0, 1, 2]),
            "criterion": torch.nn.CrossEntropyLoss(),
        }
        exec(code, namespace)
        if "loss_ttt" in namespace:
            parameters = namespace["network"].parameters()
            assert all(parameter.grad is not None for parameter in parameters)
        else:
            assert namespace["logits"].shape == (3, 10)
            assert namespace["logits"].isfinite().all()


def test_every_engine_of_torch_ttt_has_its_place_in_the_table():
    """Names on the left are torch-ttt's registry, names on the right are methods that exist."""
    table = (
        text_of("docs/torch_ttt.md")
        .split("## Their nine engines")[1]
        .split("\n\n")[1]
        .splitlines()[2:]
    )
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert {name.strip("`") for name, *_ in rows if name} == {
        *("ttt", "ttt_pp", "masked_ttt", "actmad", "tent", "eata", "memo", "deyo", "ittt"),
    }
    protocol_of = {"Engine": "episodic", "stream": "online"}
    for _, name, forms, _ in rows:
        protocols = {protocol_of[form.strip(" `")] for form in forms.split(",")}
        assert protocols == set(declared(name.strip("`")).protocols)


def anchors(page):
    """List the headings of a page as GitHub links to them."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_name_no_missing_file_or_heading():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}#{anchor}"
