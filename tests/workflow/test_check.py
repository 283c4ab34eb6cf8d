"""``ttt-lab check``: from two folders and a network to a verdict, and the lines that it prints."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.helpers import whole
from tools.stage_code import ROOT
from tttlab.config.params import read_params
from tttlab.data.decoding import to_square
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.evaluation.results import Results
from tttlab.reporting.verdict import lines_of, sentence
from tttlab.workflow import check_settings, checking, cli, places

SHARED = [folder / "shared" / "data" / "pacs" for folder in ROOT.parents]
PACS = next(filter(Path.is_dir, SHARED), None)
FILE = ["--network", "network.safetensors"]
FOLDERS = ["--labeled", "summer", "--test", "winter", "--quick"]
NETWORK = [*FILE, "--backbone", "resnet18"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    whole.write_folders(root / "summer", slice(900, 1200))
    whole.write_folders(root / "winter", slice(1200, 1300), whole.darker)
    whole.write_checkpoint(root / "network.safetensors", classes=json.dumps(whole.NAMES))
    (root / "names.txt").write_text("\n".join(whole.NAMES), encoding="utf-8")
    return root


@pytest.fixture
def here(images, monkeypatch):
    monkeypatch.chdir(images)
    return images


def edit(file, **changes):
    """Change values of the written settings, as a user does; keys are paths with __."""
    yaml = YAML()
    values = yaml.load(file.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *above, key = path.split("__")
        section = values
        for name in above:
            section = section[name]
        section[key] = value
    with file.open("w", encoding="utf-8") as stream:
        yaml.dump(values, stream)


def run_lines(code, out, run):
    """Run lines on the images that `adapt` saw; → what they define, and what `adapt` wrote."""
    table = shifted_table(out, run)
    test = ImageSet.load(out / "outputs" / "data" / "test")
    rows = [test.image_ids.index(name) for name in table["image_id"]]
    names = {
        "images": as_images(torch.from_numpy(test.pixels[rows])),
        "names": [*table["image_id"]],
    }
    exec(code, names)
    return names, table


def assert_lines_give_what_adapt_wrote(code, out, run):
    names, table = run_lines(code, out, run)
    confidence, predictions = names["result"].logits.softmax(-1).max(-1)
    classes = json.loads((out / "outputs/finetuned/network/0/network.json").read_text())["classes"]
    same = predictions.numpy() == table["adapted_prediction"]
    # In single precision two classes of equal probability may change places.
    assert same.mean() > 0.98
    np.testing.assert_allclose(confidence, table["adapted_confidence"], atol=1e-4)
    assert names["classes"] == [classes[number] for number in predictions]


@pytest.fixture(scope="module")
def checked(images, tmp_path_factory):
    """Check the digits with edited settings: few runs, and the least work."""
    out, patch = tmp_path_factory.mktemp("out") / "check", pytest.MonkeyPatch()
    patch.chdir(images)
    arguments = [*NETWORK, *FOLDERS, "--image-size", "16", "--mean", *map(str, whole.MEAN)]
    request = ["check", *arguments, "--std", *map(str, whole.STD), "--out", str(out)]
    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(checking, "STAGES", {})  # the settings alone
        stop.setattr(checking, "tell", lambda *_: None)
        cli.main(request)
    search = {"threshold": [1.0]}
    shrink = {"method": "none", "normalisation": "shrink", "threshold": 1.0, "search": search}
    both = shrink | {"average": 3, "search": search | {"average": [3]}}
    dressed = {"method": "dressed", "steps": 0, "num_views": 2}
    edit(
        out / "params.yaml",
        models__network__backbone_options={**whole.OPTIONS, "stem_width": 8},
        adapt__runs={
            "none": {"method": "none"},
            "shrink": shrink,
            "both": both,
            "dressed": dressed,
        },
        tune__images=[10],
        distance__images=20,
        distance__permutations=19,
        machine__workers=0,
        machine__device="cpu",
    )
    before = places.ROOT, places.OUTPUTS, sorted(images.iterdir())
    # A tiny network on digits: what tuning says is no matter here, so one run is recommended.
    patch.setattr("tttlab.reporting.verdict.recommend", lambda *_: "shrink")
    cli.main(["check", "--out", str(out)])
    assert (places.ROOT, places.OUTPUTS, sorted(images.iterdir())) == before
    patch.undo()
    return out


def test_an_edited_check_goes_on_and_ends_with_a_verdict(checked, images, capsys, monkeypatch):
    monkeypatch.setattr("tttlab.reporting.verdict.recommend", lambda *_: "shrink")
    monkeypatch.setattr(checking, "STAGES", {"evaluate": "compare"})
    monkeypatch.chdir(images)
    cli.main(["check", "--out", str(checked)])
    text = capsys.readouterr().out
    metrics = json.loads((checked / "outputs" / "metrics.json").read_text())["runs"]
    gain = f"{100 * metrics['network/shrink']['gain']:+.1f}".replace("-", "−")
    assert f" {gain} points (95 % interval " in text
    assert f"settings   {checked / 'params.yaml'}" in text
    code = text.partition("The lines that do it:\n\n")[2].partition("\nreport  ")[0]
    assert_lines_give_what_adapt_wrote(code, checked, "shrink")
    page = (checked / "outputs" / "report.html").read_text(encoding="utf-8")
    verdict = re.search(r'<p class="verdict"><strong>network:</strong> (.*)</p>', page)[1]
    assert verdict in text
    assert "source_statistics.load(outputs" in page


@pytest.mark.parametrize("run", ["both", "dressed"])
def test_the_lines_of_every_run_give_what_adapt_wrote(checked, run):
    """Also where the method measures statistics of its own on source images."""
    params = read_params(checked / "params.yaml")
    outputs, pairs = checked / "outputs", [("network", run)]
    code = lines_of(Results.read(outputs, pairs), params, outputs, "network", run)
    assert ("complete_statistics" in code) == (run == "dressed")
    assert_lines_give_what_adapt_wrote(code, checked, run)


def test_the_accuracy_is_the_networks_own(checked):
    """The user's own program, on the user's own files, in double precision."""
    network = whole.own_network().double().eval()
    pixels, labels = whole.digits(slice(1200, 1300))
    shifted = np.stack([whole.darker(image) for image in pixels])
    with torch.no_grad():
        logits = network(torch.from_numpy(shifted).permute(0, 3, 1, 2).double() / 255)
    accuracy = (logits.argmax(-1).numpy() == labels).mean()
    metrics = json.loads((checked / "outputs" / "metrics.json").read_text())["runs"]
    assert metrics["network/none"]["accuracy_source"] == pytest.approx(accuracy, abs=0.01)
    assert len(labels) == 100


def test_what_was_asked_before_is_never_overwritten(checked, here):
    with pytest.raises(UserError, match="found those of another check; go on with them"):
        checking.settle(check_settings.Request("resnet18", "timm", here, here), checked)
    (here / "own").mkdir()
    (here / "own" / "params.yaml").write_text("seed: 1\n")
    for request in (None, check_settings.Request("resnet18", "timm", here, here)):
        with pytest.raises(UserError, match="found others, which stay as they are"):
            checking.settle(request, here / "own")
    assert (here / "own" / "params.yaml").read_text() == "seed: 1\n"
    shutil.rmtree(here / "own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "params.yaml: expected the settings of an earlier check, found none; give --network"),
        (["--labeled", "summer"], "--network: missing"),
        ([*NETWORK, "--labeled", "summer"], "--test: missing"),
        ([*NETWORK, "--labeled", "summer", "--test", "w"], "--test: expected a folder, found none"),
        ([*FILE, *FOLDERS], "--backbone: missing; name the timm architecture of network.safe"),
        (["--network", "no.safetensors", *FOLDERS], "--network: expected a file of weights, the d"),
        (["--network", "timm", *FOLDERS], "--backbone: missing"),
        (["--network", "a.b", *FOLDERS], "--image-size: missing; give the side in pixels of the"),
        (["--network", "a.b", "--backbone", "resnet18", *FOLDERS], "--backbone: expected nothing"),
        (["--network", "a.b", "--image-size", "16", *FOLDERS], "network.finetune.classes: missing"),
        ([*FILE, "--backbone", "resnet19", *FOLDERS], "unknown backbone 'resnet19'; did you mean"),
        (
            [*NETWORK, *FOLDERS, "--image-size", "16", "--mean", "0", "0", "0"],
            "models.network.finetune.std: missing; mean is given, and they belong together",
        ),
        (
            [*NETWORK, *FOLDERS, "--classes", "no.txt"],
            "models.network.finetune.classes: expected a list of names, or a text file",
        ),
        (
            ["--network", "a.b", "--image-size", "16", "--classes", "names.txt", *FOLDERS],
            "models: backbone a.b: expected a callable that returns a torch.nn.Module",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(here, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(["check", *arguments, "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    # What is left is whole settings, and nothing that would stand in the way of the right command.
    left = [file.name for file in (tmp_path / "out").glob("params*")]
    assert left == (["params.yaml"] if message.startswith("models: backbone a.b:") else [])
    weights = str(here / "network.safetensors")
    right = check_settings.Request("resnet18", weights, here / "summer", here / "winter")
    file = checking.settle(right, tmp_path / "out")
    assert file.read_text(encoding="utf-8") == check_settings.as_text(right, tmp_path / "out")


@pytest.fixture
def prepared_only(monkeypatch):
    """Let a check read the images and no more."""
    monkeypatch.setattr(checking, "STAGES", {"prepare": "read the images"})
    monkeypatch.setattr(checking, "tell", lambda *_: None)


@pytest.fixture
def winter(images, tmp_path):
    """Ten test images, and one that is none."""
    for file in sorted((images / "winter").glob("*/*.png"))[::10]:
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def line_of(capsys, *arguments):
    """Give the one line in which a command ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(["check", *map(str, arguments)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_settings_that_a_message_tells_to_edit_are_there(here, winter, prepared_only, capsys):
    out = here / "edited check"
    folders = ["--labeled", "summer", "--test", winter, "--quick"]
    line = line_of(capsys, *NETWORK, *folders, "--image-size", 16, "--out", out)
    assert "broken.png" in line
    assert "data.unreadable: skip" in line
    file = out / "params.yaml"
    command = f"{places.program()} check --out '{out}'"
    assert line.endswith(f"(settings: {file}; after an edit: {command})")
    edit(file, data__unreadable="skip", machine__workers=0)
    edited = file.read_text(encoding="utf-8")
    cli.main(["check", "--out", str(out)])
    entry = json.loads((out / "outputs" / "data" / "summary.json").read_text())["test"]
    assert (entry["images"], entry["skipped"]) == (len([*winter.glob("*.png")]) - 1, 1)
    # What the user has edited is the user's: another command does not write over it.
    line = line_of(capsys, *NETWORK, *FOLDERS, "--out", out)
    assert "found those of another check; go on with them" in line
    assert file.read_text(encoding="utf-8") == edited


def test_a_wrong_command_gives_way_to_the_right_one(here, winter, prepared_only, capsys):
    out, size = here / "corrected", ["--image-size", "16"]
    wrong = [*NETWORK, "--labeled", "summer", "--test", str(winter), "--quick", *size]
    assert "broken.png" in line_of(capsys, *wrong, "--out", out)
    file = out / "params.yaml"
    first = file.read_text(encoding="utf-8")
    # A command that is wrong in itself leaves the settings as they are.
    line_of(capsys, *FILE, "--backbone", "resnet19", *FOLDERS, "--out", out)
    assert file.read_text(encoding="utf-8") == first
    cli.main(["check", *NETWORK, *FOLDERS, *size, "--out", str(out)])
    assert read_params(file).data.test.root == here / "winter"
    entry = json.loads((out / "outputs" / "data" / "summary.json").read_text())["test"]
    assert (entry["images"], entry["skipped"]) == (100, 0)
    # Once settings have been tuned, their results would be lost.
    (out / "outputs" / "tuned").mkdir()
    assert "found those of another check" in line_of(capsys, *wrong, "--out", out)
    cli.main(["check", *NETWORK, *FOLDERS, *size, "--out", str(out)])  # the same one goes on


def test_a_second_check_in_a_folder_ends_in_one_line(here, prepared_only, capsys, monkeypatch):
    out, told = here / "at once", []
    request = [*NETWORK, *FOLDERS, "--image-size", "16", "--out", str(out)]

    def second(*_):
        told.extend(line_of(capsys, *words) for words in (request, ["--out", out]))
        (out / "check.lock").write_text("")  # so an older filelock leaves it
        told.append(line_of(capsys, *request))

    monkeypatch.setattr(checking, "run_stage", second)
    cli.main(["check", *request])
    number, way_out = os.getpid(), "wait for it to end or stop it"
    known = f"error: this work is already running as process {number}; {way_out} (kill {number})"
    assert told == [known, known, f"error: this work is already running in {out}; {way_out}"]
    monkeypatch.setattr(checking, "run_stage", lambda *_: None)
    cli.main(["check", *request])  # with the first its lock has gone


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ("names.txt", "a file at {here}/names.txt"),
        ("names.txt/below/it", "a file at {here}/names.txt"),
        ("long" * 64, "{here}/" + "long" * 64 + ": File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_ends_in_one_line(here, capsys, out, found):
    before = sorted(here.iterdir())
    line = line_of(capsys, *NETWORK, *FOLDERS, "--out", out)
    start = "error: --out: expected a folder that can be made, found "
    assert line == start + found.format(here=here) + "; name another"
    assert sorted(here.iterdir()) == before


def test_a_folder_of_others_is_left_as_it_is(tmp_path, here, capsys):
    for name, content in (("text", b"seed: 1\n"), ("bytes", b"\xff\xfe"), ("folder", None)):
        file = tmp_path / name / "params.yaml"
        file.parent.mkdir()
        file.mkdir() if content is None else file.write_bytes(content)
        for words in ([], [*NETWORK, *FOLDERS]):
            line = line_of(capsys, *words, "--out", file.parent)
            assert "found others, which stay as they are" in line
        assert [*file.parent.iterdir()] == [file]


ALONE = "missing; give --network, --labeled and --test, or --out alone to go on with an earlier"


@pytest.mark.parametrize(
    "words",
    [
        ["--network", ""],
        ["--backbone", "resnet18"],
        ["--labeled", "summer"],
        ["--test", "winter"],
        ["--classes", "names.txt"],
        ["--image-size", "99"],
        ["--image-size", "0"],
        ["--mean", "0", "0", "0"],
        ["--std", "1", "1", "1"],
        ["--flip"],
        ["--quick"],
    ],
    ids=" ".join,
)
def test_no_option_is_passed_over_where_a_check_goes_on(
    here, tmp_path, prepared_only, capsys, words
):
    request = [*NETWORK, *FOLDERS, "--image-size", "16", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(checking, "STAGES", {})
        cli.main(["check", *request])
    missing = "--labeled" if words[0] == "--network" else "--network"
    assert line_of(capsys, "--out", tmp_path, *words).startswith(f"error: {missing}: {ALONE} check")
    assert not (tmp_path / "outputs").exists()  # it has not gone on


def test_the_list_of_options_is_whole():
    """An option that is new must be tried above, too."""
    mark = test_no_option_is_passed_over_where_a_check_goes_on.pytestmark[0]
    tried = {words[0] for words in mark.args[1]}
    names = {name.replace("_", "-") for name in check_settings.Request.__dataclass_fields__}
    assert tried == {f"--{name}" for name in names - {"weights"}} | {"--network"}


@pytest.mark.parametrize("size", [0, -1, 7])
def test_a_size_below_the_smallest_is_refused(here, tmp_path, capsys, size):
    line = line_of(capsys, *NETWORK, *FOLDERS, "--image-size", size, "--out", tmp_path / "out")
    assert line == f"error: --image-size: expected 8 pixels or more, found {size}"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_labels_the_verdict_tells_what_can_be_said(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(images)
    for file in (images / "winter").glob("*/*.png"):
        shutil.copy(file, tmp_path / f"{file.parent.name}-{file.name}")
    network = ["--network", "tests.helpers.whole.own_network", "--classes", "names.txt"]
    folders = ["--labeled", "summer", "--test", str(tmp_path), "--quick"]
    out = tmp_path.parent / "unlabeled"
    cli.main(["check", *network, "--image-size", "16", *folders, "--out", str(out)])
    text = capsys.readouterr().out
    assert "\nThe test images have no labels, so that their accuracy is unknown; " in text
    assert "their distance to the source is " in text
    assert "the accuracy of the network as it is, estimated from its confidence, is " in text
    metrics = json.loads((out / "outputs" / "metrics.json").read_text())["runs"]
    assert {entry["accuracy_source"] for entry in metrics.values()} == {None}


def train_on_photos(root):
    """Train a small network on half of the photographs; → those of the other half, in folders."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    files = sorted((PACS / "photo").glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    pixels = torch.from_numpy(np.stack([to_square(file, 32) for file in files[::2]]))
    images = whole.standardised(as_images(pixels))
    labels = torch.tensor([classes.index(file.parent.name) for file in files[::2]])
    network = whole.build(len(classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for epoch in range(12):
        for rows in torch.randperm(len(images)).split(32):
            flipped = images[rows].flip(-1) if epoch % 2 else images[rows]
            optimizer.zero_grad()
            F.cross_entropy(network(flipped), labels[rows]).backward()
            optimizer.step()
    for file in files[1::4]:
        (root / "photo" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / "photo" / file.parent.name / file.name).symlink_to(file)
    for file in sorted((PACS / "art_painting").glob("*/*"))[::16]:
        (root / "art" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / "art" / file.parent.name / file.name).symlink_to(file)
    save_file(network.state_dict(), root / "photos.safetensors")
    (root / "classes.txt").write_text("\n".join(classes), encoding="utf-8")
    return network.double().eval(), classes


@pytest.mark.slow
@pytest.mark.skipif(PACS is None, reason="the images of PACS are not on this machine")
def test_photographs_and_paintings(tmp_path, capsys, monkeypatch):
    """Every run's lines give what `adapt` wrote, and the verdict's numbers are the metrics'."""
    monkeypatch.chdir(tmp_path)
    network, classes = train_on_photos(tmp_path)
    out = tmp_path / "out"
    request = check_settings.Request(
        "resnet18",
        str(tmp_path / "photos.safetensors"),
        tmp_path / "photo",
        tmp_path / "art",
        tmp_path / "classes.txt",
        image_size=32,
        mean=whole.MEAN,
        std=whole.STD,
        flip=True,
        quick=True,
    )
    file = checking.settle(request, out)
    options = {**whole.OPTIONS, "stem_width": 8}
    edit(file, models__network__backbone_options=options, machine__workers=0, machine__device="cpu")
    checking.check(None, out)
    text, params = capsys.readouterr().out, read_params(file)
    results = Results.read(out / "outputs", params.pairs)
    assert f"\n{sentence(results, 'network')}\n" in text
    test = ImageSet.load(out / "outputs" / "data" / "test")
    assert test.classes == tuple(classes)
    rows = [test.image_ids.index(name) for name in shifted_table(out, "none")["image_id"]]
    images = whole.standardised(as_images(torch.from_numpy(test.pixels[rows])).double())
    with torch.no_grad():
        accuracy = (network(images).argmax(-1).numpy() == test.labels[rows]).mean()
    assert results.summary["network", "none"]["accuracy_source"] == pytest.approx(accuracy)
    for run in params.adapt.runs:
        code = lines_of(results, params, out / "outputs", "network", run)
        assert_lines_give_what_adapt_wrote(code, out, run)


def shifted_table(out, run):
    table = pd.read_parquet(out / "outputs" / "adapted" / run / "network" / "0.parquet")
    return table[table["shift"] == "test"]
