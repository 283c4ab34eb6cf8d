"""Compare, with labels and after the fact, the gradients of a run's test-time loss and of the supervised loss."""

import shutil

import pipeline
from tttlab.params import Params


def run(params: Params, name: str) -> None:
    """Write outputs/aligned/<run>/<model>.parquet, a row per (image, shift) of part of the test images, for runs that train."""
    folder = pipeline.OUTPUTS / "aligned" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained = [model for model in params.models if params.run_settings(name, model).trains]
    for model in trained if params.alignment.images else []:
        table = align_model(params, name, model)
        if table is not None:
            table.to_parquet(folder / f"{model}.parquet", index=False)


def align_model(params: Params, name: str, model: str):
    """Compare the gradients on the network of the first training seed; None without labels, or where nothing trains."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    from pipeline.loading import build_run, load_source, load_tuned
    from tttlab.alignment import gradient_alignment
    from tttlab.data import ImageSet, balanced_subset
    from tttlab.loaders import as_images
    from tttlab.shifts import list_shifts

    test = ImageSet.load(pipeline.OUTPUTS / "data" / "test")
    count = min(params.alignment.images, params.shifts.images or len(test))
    images = test.take(balanced_subset(test.image_ids, test.labels, count, params.seed, "shifts"))  # among those of adapt
    if (images.labels < 0).any():
        return None
    source = load_source(params, model, params.seeds[0])
    _, method, loop, statistics = build_run(params, name, model, source, load_tuned(name, model)["settings"])
    if loop.trainable == "none":
        return None
    tables = []
    shifts = list_shifts(params.shifts.corruptions, params.shifts.severities)
    for shift in tqdm(shifts, f"align {name} {model}", unit="shift", mininterval=1):
        pixels = as_images(torch.from_numpy(shift.apply(images, params.seed))).to(source.device)
        found = gradient_alignment(source.network, pixels, torch.from_numpy(images.labels), method, loop, statistics=statistics,
                                   image_ids=images.image_ids, seed=params.seed)  # fmt: skip
        columns = {key: value.numpy() for key, value in found._asdict().items()}
        tables.append(pd.DataFrame({"image_id": images.image_ids, "shift": shift.name, "seed": params.seeds[0], **columns}))
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    pipeline.main(run, __doc__, "run")
