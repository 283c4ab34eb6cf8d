"""What the documents show is run as it stands."""

import copy
import inspect
import re
import sys

import pytest
import timm
import torch
from ruamel.yaml import YAML

import tttlab.methods
from tests.helpers import contract, networks
from tests.methods.test_contract import LOOPS, assert_vectorised_equals_one_image_at_a_time
from tools.stage_code import ROOT
from tttlab.adaptation.adapter import InnerLoop, adapt
from tttlab.adaptation.engine import Engine
from tttlab.adaptation.inner_loop import select_parameters
from tttlab.adaptation.method import Method
from tttlab.adaptation.registry import load_method
from tttlab.config.method_settings import HOOKS, declared
from tttlab.data.views import Augmentation, random_views
from tttlab.seeding import torch_generator


def code_blocks(name: str) -> list[str]:
    return re.findall(
        r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL
    )


def test_the_readmes_ten_lines_run_on_any_timm_classifier(capsys):
    (code,) = code_blocks("README.md")
    generator = torch.Generator().manual_seed(0)
    images = {
        name: torch.randn(count, 3, 64, 64, generator=generator)
        for name, count in (("source", 12), ("test", 3))
    }
    names = {f"{name}_images": value for name, value in images.items()}
    exec(code.replace("pretrained=True", "pretrained=False"), names)  # no download here
    assert names["result"].logits.shape == (3, 1000)
    assert "predictions changed" in capsys.readouterr().out


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """A folder with the document's files, whose package can be imported."""
    folder = tmp_path / "my_package"
    folder.mkdir()
    for name, code in zip(
        ("soft_entropy", "anchored_views"), code_blocks("docs/add_a_method.md"), strict=True
    ):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [
        name
        for name in sys.modules
        if name.startswith("my_package") or name == "tttlab.methods.soft_entropy"
    ]:
        sys.modules.pop(name)


@pytest.mark.parametrize("name", ["soft_entropy", "my_package.soft_entropy"])
def test_the_documents_example_is_a_method_at_each_of_the_two_places_that_it_names(
    my_package, monkeypatch, name
):
    assert len((my_package / "soft_entropy.py").read_text(encoding="utf-8").splitlines()) <= 40
    if "." not in name:
        monkeypatch.setattr(tttlab.methods, "__path__", [*tttlab.methods.__path__, str(my_package)])
    run = (
        (ROOT / "docs/add_a_method.md")
        .read_text(encoding="utf-8")
        .split("```yaml\n")[1]
        .split("```")[0]
    )
    entry = YAML(typ="safe").load(run)["soft"]
    found = declared(name, my_package)
    assert entry["method"] == "my_package.soft_entropy"
    assert found.settings.model_validate({"temperature": entry["temperature"]}).temperature == 2.0
    assert found.protocols == ("episodic", "online")
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
    """Two steps, beside a loop over images with autograd on a copy of the network."""
    weak, rate, strength = Augmentation(min_scale=0.5, flip=True, jitter=0.3), 1.0, 0.5
    method = load_method(
        "my_package.anchored_views", {"num_views": 3, "strength": strength}, augmentation=weak
    )
    assert method.augmentation == weak
    assert declared("my_package.anchored_views").others == ("augmentation",)
    network, _ = networks.source_statistics("resnet")
    images = networks.images(2, seed=61).double()
    found = adapt(
        network, images, method, InnerLoop(steps=2, lr=rate, trainable="norm"), image_ids=["a", "b"]
    )
    for name, image, losses, logits in zip("ab", images, found.losses, found.logits, strict=True):
        own = copy.deepcopy(network)
        trained = list(select_parameters(own, "norm").values())
        source = [value.detach().clone() for value in trained]
        expected = []
        for step in (0, 1, 1):
            views = random_views(image[None], [torch_generator(0, "views", name, step)], 3, weak)[0]
            mean = own(views).logits.softmax(-1).mean(0)
            distance = sum(
                (value - start).square().sum() for value, start in zip(trained, source, strict=True)
            )
            loss = -(mean * mean.log()).sum() + strength * distance
            expected.append(loss.detach())
            if len(expected) < 3:
                with torch.no_grad():
                    for value, slope in zip(
                        trained, torch.autograd.grad(loss, trained), strict=True
                    ):
                        value -= rate * slope
        assert strength * distance > 1e-3
        torch.testing.assert_close(losses, torch.stack(expected))
        with torch.no_grad():
            mean = (
                own(image[None]).logits.softmax(-1) + own(image.flip(-1)[None]).logits.softmax(-1)
            )[0] / 2
        torch.testing.assert_close(logits, mean.log())


def test_the_document_gives_every_hook_as_it_is_called():
    page = (
        (ROOT / "docs/add_a_method.md")
        .read_text(encoding="utf-8")
        .split("```text\n")[1]
        .split("```")[0]
    )
    calls = {
        hook: ", ".join([*inspect.signature(getattr(Method, hook)).parameters][1:])
        for hook in HOOKS
    }
    assert {
        line.partition("(")[0]: line.partition("(")[2].partition(")")[0]
        for line in page.splitlines()
    } == calls


@pytest.mark.parametrize("name", ["my_package.soft_entropy", "my_package.anchored_views"])
def test_the_contract_tests_take_the_documents_methods(my_package, name, pytestconfig):
    assert pytestconfig.getoption("--method") == []  # so there is such an option
    assert "uv run pytest --method my_package.soft_entropy" in (
        ROOT / "docs/add_a_method.md"
    ).read_text(encoding="utf-8")
    cases = contract.cases(name)
    assert [kind for kind, _ in cases] == ["resnet", "groupnorm", "vit"]
    assert_vectorised_equals_one_image_at_a_time(*cases[0], LOOPS[0])


def test_what_takes_the_place_of_torch_ttts_engines_runs():
    blocks = [code for code in code_blocks("docs/torch_ttt.md") if "torch_ttt" not in code]
    assert len(blocks) == 5
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
    }
    expected = {"Engine": "episodic", "stream": "online"}
    for _, name, form, _ in rows:
        assert {expected[part.strip(" `")] for part in form.split(",")} == set(
            declared(name.strip("`")).protocols
        )


def anchors(page):
    """List the headings of a page as GitHub links to them."""
    headings = re.findall(
        r"^#+ (.+)$",
        re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_name_no_missing_file_or_heading():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(
            r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")
        ):
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}#{anchor}"
