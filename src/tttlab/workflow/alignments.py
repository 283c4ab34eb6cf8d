"""The agreement of the gradients of every run's loss and of the supervised loss."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.experiments.alignment import LARGEST, gradient_alignment
from tttlab.experiments.blocks import Block, list_blocks
from tttlab.runtime.group_size import GroupSize
from tttlab.runtime.parallel import in_order
from tttlab.runtime.progress import open_bar
from tttlab.shifts.corruptions.canvas import import_transforms
from tttlab.shifts.shift import Shift
from tttlab.workflow.ledger import Ledger, written_whole
from tttlab.workflow.loading import SourceNetwork, build_run, load_network, load_tuned
from tttlab.workflow.pieces import Pair
from tttlab.workflow.shifted import open_test


def align_pairs(params: Params, keys: Mapping[Pair, str], ledger: Ledger) -> None:
    """Compare the gradients for pairs of a run and a model, each with its key: a table for each."""
    images, shifts = open_test(params, params.alignment.images)  # a subset of what adapt uses
    labeled = [shift for shift in shifts if (shift.of(images).labels >= 0).all()]
    import_transforms()  # else two workers of every pair would
    sources: dict[str, SourceNetwork] = {}
    for pair, key in keys.items():
        name, model = pair
        if model not in sources:
            sources[model] = load_network(params, model, params.seeds[0])
        table = align(params, pair, sources[model], images, labeled) if labeled else None
        files = []
        if table is not None:
            file = ledger.folder / name / f"{model}.parquet"
            with written_whole(file) as partial:
                table.to_parquet(partial, index=False)
            files = [file]
        ledger.enter(str(pair), key, files)


def align(
    params: Params, pair: Pair, source: SourceNetwork, images: ImageSet, shifts: Sequence[Shift]
) -> pd.DataFrame | None:
    """Compare the gradients on one network: a row per (image, shift).

    Returns:
        None if the run trains no parameters.
    """
    task = build_run(params, *pair, source, load_tuned(*pair)["settings"]).task
    if task.loop.trainable == "none":
        return None
    workers = params.machine.workers if source.device.type == "cpu" else 0
    wish = params.machine.images_per_step
    sizes = GroupSize(wish, processes=max(workers, 1), largest=LARGEST, timed=False)

    def compare(block: Block) -> pd.DataFrame:
        part = block.shift.of(images).take(block.images)
        pixels = as_images(torch.from_numpy(block.shift.apply(part, params.seed)))
        pixels, labels = pixels.to(source.device), torch.from_numpy(part.labels)
        alignment = gradient_alignment(task, pixels, labels, part.image_ids, sizes)
        columns = {key: values.numpy() for key, values in alignment._asdict().items()}
        about = {"image_id": part.image_ids, "shift": block.shift.name, "seed": params.seeds[0]}
        return pd.DataFrame(about | columns)

    tables, blocks = [], list_blocks(shifts, images)
    title = f"align {pair.run} {pair.model}"
    with open_bar(title, len(blocks), "block") as bar:
        for table in in_order(compare, blocks, workers, lambda block: f"{title}, {block.name}"):
            tables.append(table)
            bar.update()
    return pd.concat(tables, ignore_index=True)
