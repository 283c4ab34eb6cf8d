"""Measure how far the target lies from the source through one model, before any adaptation and without test labels."""

from tttlab.config.params import Params
from tttlab.errors import UserError
from tttlab.workflow import command, places


def run(params: Params, model: str) -> None:
    """Write outputs/distances/<model>.csv: a row per training seed, reference, target and metric."""
    import pandas as pd

    from tttlab.data.image_sets import ImageSet
    from tttlab.networks import checkpoints
    from tttlab.runtime.devices import choose_device
    from tttlab.workflow.shifted import open_test

    device = choose_device(params.machine.device, params.machine.precision)
    networks = [
        checkpoints.load(places.OUTPUTS / "finetuned" / model / str(seed), device)[0]
        for seed in params.seeds
    ]
    sets = (
        ImageSet.load(places.OUTPUTS / "data" / name)
        for name in ("unlabeled", "labeled_validation")
    )
    unlabeled, labeled = (
        images.view(rows(params, images, params.distance.images, "distance")) for images in sets
    )
    test, shifts = open_test(params, params.distance.images)
    shifts = [
        shift for shift in shifts if not (shift.clean and shift.images)
    ]  # validation images: a reference themselves
    names = {shift.name: (shift.corruption, shift.severity) for shift in shifts} | {
        "labeled": ("none", 0)
    }
    first, tables = ["model", "seed", "reference", "target", "corruption", "severity"], []
    try:
        for seed, network in zip(params.seeds, networks, strict=True):
            found = measure_network(params, network, unlabeled, labeled, test, shifts).assign(
                model=model, seed=seed
            )
            found[["corruption", "severity"]] = [names[name] for name in found["target"]]
            tables.append(found[first + [column for column in found if column not in first]])
    except UserError as error:  # too few images for this; nothing else needs it
        print(f"{model}: distances are left out: {error}")
    table = pd.concat(tables) if tables else pd.DataFrame(columns=first)
    (places.OUTPUTS / "distances").mkdir(parents=True, exist_ok=True)
    table.to_csv(places.OUTPUTS / "distances" / f"{model}.csv", index=False, float_format="%.6g")


def measure_network(params: Params, network, unlabeled, labeled, test, shifts):
    """Measure one training of the model: from both references to everything that comes after them."""
    import pandas as pd

    from tttlab.evaluation import shift_estimates
    from tttlab.training.probing import encode

    def sample(images):
        features, logits, _ = encode(network, images, params.machine.images_per_step)
        return shift_estimates.Sample(features.numpy(), logits.numpy())

    own = {shift.name: shift.of(test) for shift in shifts}
    samples, tables = {shift.name: sample(shift.seen(test, params.seed)) for shift in shifts}, []
    for name, images, others in (
        ("unlabeled", unlabeled, {"labeled": labeled}),
        ("labeled", labeled, {}),
    ):
        sizes = [*map(len, own.values()), *map(len, others.values())]
        size = shift_estimates.sample_size(len(images), *sizes, at_most=params.distance.images)
        labels = images.labels if name == "labeled" else None
        # Targets without labels are not balanced by class: neither must the reference's own samples be.
        groups = labels if all((images.labels >= 0).all() for images in own.values()) else None
        reference = shift_estimates.Reference(
            sample(images), rows(params, images, size, "distance"), labels, groups
        )
        targets = {
            key: sample(other).take(rows(params, other, size, "distance"))
            for key, other in others.items()
        }
        targets |= {
            key: found.take(rows(params, own[key], size, "shifts"))
            for key, found in samples.items()
        }
        table = shift_estimates.measure(
            reference, targets, seed=params.seed, permutations=params.distance.permutations
        )
        tables.append(table.assign(reference=name))
    return pd.concat(tables, ignore_index=True)


def rows(params: Params, images, count: int | None, key: str):
    """Choose images as every other stage does: balanced, the fewer among the more."""
    from tttlab.data.splits import balanced_subset

    return balanced_subset(images.image_ids, images.labels, count, params.seed, key)


if __name__ == "__main__":
    command.main(run, __doc__, "model")
