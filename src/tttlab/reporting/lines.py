"""The lines of Python that adapt images as a run did."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tttlab.config.inner_loop import Augmentation
from tttlab.config.loop_settings import LoopSettings

TOLD = ("steps", "lr", "trainable")  # in the lines even where they are the default


class Source(NamedTuple):
    """The source images that a method measures statistics of its own on.

    Attributes:
        images: how many; None: all.
        seed: of their choice.
    """

    images: int | None
    seed: int


def write_code(
    settings: Mapping[str, Any],
    module: str,
    augmentation: Augmentation,
    outputs: Path,
    key: str,
    source: Source | None = None,
) -> str:
    """Write the lines that adapt images as a run did.

    Args:
        settings: of the run, as `adapt` used them.
        module: where the run's method is defined.
        augmentation: of the views that predictions are averaged over.
        outputs: the folder of outputs.
        key: ``<model>/<training seed>``.
        source: of a method that measures statistics of its own.

    Returns:
        Python for ``images (N, 3, H, W)``, RGB in [0, 1], and their ``names``, which key the random
        views.
    """
    fields = LoopSettings.model_fields.items()
    loop = {"steps": 0} | {
        name: _plain(settings[name])
        for name, field in fields
        if name in settings and (name in TOLD or settings[name] != field.default)
    }
    if loop.get("average"):
        loop["augmentation"] = augmentation
    arguments = ", ".join(f"{name}={value!r}" for name, value in loop.items())
    method, seed = settings["method"], settings["seed"]
    imports = [
        "from tttlab.adaptation.adapter import InnerLoop, adapt",
        f"from {module} import {method.partition('(')[0]}",
        "from tttlab.networks import checkpoints, source_statistics",
    ]
    if "Augmentation(" in method + arguments:
        imports.insert(1, "from tttlab.config.inner_loop import Augmentation")
    options = f"statistics=statistics, image_ids=names, seed={seed}"
    lines = [
        f"network, about = checkpoints.load(outputs / 'finetuned' / {key!r})",
        f"statistics = source_statistics.load(outputs / 'source_stats' / {key!r}, about['sha256'])",
        f"method, loop = {method}, InnerLoop({arguments})",
        *_measuring(source, imports),
        f"result = adapt(network, images, method, loop, {options})",
        "classes = [about['classes'][number] for number in result.logits.argmax(-1)]",
    ]
    about = "# images: (N, 3, H, W), RGB in [0, 1]; names: of the N files"
    head = [
        "from pathlib import Path",
        "",
        *imports,
        "",
        f"outputs = Path({str(outputs)!r})",
        about,
    ]
    return "\n".join([*head, *lines, ""])


def _measuring(source: Source | None, imports: list[str]) -> list[str]:
    """Write the lines that measure a method's own statistics, and add what they import."""
    if source is None:
        return []
    imports += [
        "from tttlab.adaptation.task import complete_statistics",
        "from tttlab.workflow.source_images import open_source_images",
    ]
    drawn = f"outputs / 'data' / 'labeled_train', {source.images}, {source.seed}"
    return [
        f"source = open_source_images({drawn})",
        "statistics = complete_statistics(statistics, method, network, lambda: source)",
    ]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
