"""What the demo shows: the trained models, the test images, and where distances lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.evaluation.results import CONTROL, read_table
from tttlab.runtime.devices import choose_device
from tttlab.serving import adaptive_model
from tttlab.serving.adaptive_model import AdaptiveModel
from tttlab.serving.pictures import Limits, decode
from tttlab.serving.showing import Picture, Spread, distances, show
from tttlab.shifts.corruptions import corrupt_all
from tttlab.workflow import places

SOURCE_IMAGES, CORRUPTED_IMAGES = 256, 32  # that distances are measured on, at most


@dataclass
class Material:
    """All that can be looked at.

    Attributes:
        models: by name.
        test: the test images.
        source: where the distances of source images lie that training did not see, by model.
        shifts: mean distance of every tested shift by name, for each model.
        limits: of images that are brought along.
        strength: whose strengths corruptions have, as ``shifts.strength`` says.
    """

    models: Mapping[str, AdaptiveModel]
    test: ImageSet
    source: Mapping[str, Spread]
    shifts: Mapping[str, Mapping[str, float]]
    limits: Limits = Limits()
    strength: str = "own"
    _corrupted: dict[tuple[str, str, int], Spread] = field(default_factory=dict)

    def picture(self, number: int) -> Picture:
        """Take a test image by its number, from 1 on."""
        index = int(number) - 1
        if not 0 <= index < len(self.test):
            raise UserError(f"test image: expected 1 to {len(self.test)}, found {number}")
        label = int(self.test.labels[index])
        truth = self.test.classes[label] if label >= 0 else None
        pixels, key = np.asarray(self.test.pixels[index]), self.test.image_ids[index]
        return Picture(pixels, key, truth, self.strength)

    def own(self, file: Path, model: str) -> Picture:
        """Read a photo that somebody brings along, as the pipeline reads files."""
        chosen = self.models[model]
        picture = Picture.own(decode(file, chosen.image_size, chosen.depth, self.limits))
        return replace(picture, strength=self.strength)

    def corrupted(self, model: str, corruption: str, severity: int) -> Spread:
        """Measure, once, where the distances of some corrupted test images lie."""
        key = model, corruption, severity
        if key not in self._corrupted:
            images = self.test.view(spaced(len(self.test), CORRUPTED_IMAGES))
            seed = next(iter(self.models[model].runs.values())).task.seed
            shown = images.pixels, images.image_ids
            pixels = corrupt_all(*shown, corruption, severity, seed, self.strength)
            self._corrupted[key] = Spread.of(distances(self.models[model], pixels))
        return self._corrupted[key]


def open_material(params: Params) -> Material:
    """Load what the pipeline left.

    Raises:
        UserError: it did not get as far as the stage `register`.
    """
    device = choose_device(params.machine.device, params.machine.precision)
    models = {
        name: adaptive_model.load(places.OUTPUTS / "served" / name, device)
        for name in params.models
    }
    data = places.OUTPUTS / "data"
    test, source = ImageSet.load(data / "test"), ImageSet.load(data / "labeled_validation")
    some = source.view(spaced(len(source), SOURCE_IMAGES))
    spreads = {
        name: Spread.of(distances(model, np.asarray(some.pixels))) for name, model in models.items()
    }
    shifts, strength = read_shifts(list(models)), params.shifts.strength
    material = Material(models, test, spreads, shifts, strength=strength)
    for model in models.values():  # the first call of all pays for much
        show(model, material.picture(1))
    return material


def read_shifts(models: list[str]) -> dict[str, dict[str, float]]:
    """Read the mean distance of every tested shift, if the table is there."""
    file = places.OUTPUTS / "tables" / "by_shift.csv"
    if not file.is_file():
        return {model: {} for model in models}
    table = read_table(file)
    table = table[table["run"] == CONTROL].dropna(subset=["distance"])
    of_model = {model: table[table["model"] == model] for model in models}
    return {
        model: rows.set_index("shift")["distance"].to_dict() for model, rows in of_model.items()
    }


def spaced(count: int, most: int) -> np.ndarray:
    """Choose positions of at most so many of ``count`` images, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
