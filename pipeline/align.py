"""Compare, with labels and after the fact, the gradients of a run's test-time loss and of the supervised loss."""

from tttlab.config.params import Params
from tttlab.workflow import command, places

COLUMNS = {
    "image_id": "string",
    "shift": "string",
    "seed": "int64",
    "cosine": "float32",
    "inner": "float32",
    "supervised_loss": "float32",
}


def run(params: Params, name: str) -> None:
    """Write outputs/aligned/<run>/<model>.parquet, of runs that train on single images: a row per (image, shift) of a part."""
    import pyarrow as pa  # which takes a tenth of pandas' time, where there is nothing to compare
    from pyarrow import parquet

    folder = places.OUTPUTS / "aligned" / name
    folder.mkdir(parents=True, exist_ok=True)
    for model in params.models_of(name):
        own = params.run_settings(name, model)
        wanted = (
            params.alignment.images and own.trains and own.protocol == "episodic"
        )  # a stream's step is not an image's
        tables = align_model(params, name, model) if wanted else []
        schema = pa.schema([(column, getattr(pa, kind)()) for column, kind in COLUMNS.items()])
        batches = [
            pa.RecordBatch.from_pandas(table, schema, preserve_index=False) for table in tables
        ]
        parquet.write_table(pa.Table.from_batches(batches, schema), folder / f"{model}.parquet")


def align_model(params: Params, name: str, model: str) -> list:
    """Compare the gradients on the network of the first training seed, a table per shift; none without labels or training."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    from tttlab.data.pixels import as_images
    from tttlab.experiments import alignment
    from tttlab.experiments.blocks import list_blocks
    from tttlab.runtime.group_size import GroupSize
    from tttlab.workflow.loading import build_run, load_source, load_tuned
    from tttlab.workflow.shifted import open_test

    test, shifts = open_test(params, params.alignment.images)  # among those of adapt
    known = [shift for shift in shifts if (shift.of(test).labels >= 0).all()]
    if not known:
        return []
    source = load_source(params, model, params.seeds[0])
    _, method, loop, statistics = build_run(
        params, name, model, source, load_tuned(name, model)["settings"]
    )
    if loop.trainable == "none":
        return []
    sizes = GroupSize(params.machine.images_per_step, largest=alignment.LARGEST, timed=False)
    tables = []
    for block in tqdm(
        list_blocks(known, test), f"align {name} {model}", unit="block", mininterval=1
    ):
        images = block.shift.of(test).take(block.images)
        pixels = as_images(torch.from_numpy(block.shift.apply(images, params.seed))).to(
            source.device
        )
        found = alignment.gradient_alignment(
            source.network,
            pixels,
            torch.from_numpy(images.labels),
            method,
            loop,
            statistics=statistics,
            image_ids=images.image_ids,
            seed=params.seed,
            images_per_step=sizes,
        )
        columns = {key: value.numpy() for key, value in found._asdict().items()}
        own = {"image_id": images.image_ids, "shift": block.shift.name, "seed": params.seeds[0]}
        tables.append(pd.DataFrame(own | columns))
    return tables


if __name__ == "__main__":
    command.main(run, __doc__, "run")
