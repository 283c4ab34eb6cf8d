"""What one run of params.yaml needs of one model, checked before any work."""

import torch

import pipeline
from pipeline.source_stats import source_batches
from tttlab import checkpoints, devices, registry, source_statistics, sweep
from tttlab.inner_loop import select_parameters
from tttlab.params import Params
from tttlab.views import Augmentation


def load_run(params: Params, name: str, model: str, device: torch.device | None = None) -> tuple:
    """Load one model and what its run needs: device, network, its description, method, inner loop, source statistics.

    Args:
        params: all settings.
        name: the run's name.
        model: the model's name.
        device: where to compute; None: as ``machine.device`` says.
    """
    device = device or devices.choose_device(params.machine.device)
    network, checkpoint = checkpoints.load(pipeline.OUTPUTS / "finetuned" / model, device)
    statistics = source_statistics.load(pipeline.OUTPUTS / "source_stats" / model, checkpoint["sha256"])
    chosen, trained = params.run_settings(name, model), params.models[model]
    # A self-supervised head knows the views that it was trained on.
    views = trained.pretrain.augment if chosen.method == trained.objective.name else params.adapt.augment
    method = registry.load_method(chosen.method, chosen.settings, objective=trained.objective.model_dump(),
                                  augmentation=Augmentation(**views.model_dump()))  # fmt: skip
    loop = sweep.inner_loop(chosen.adapter.model_dump())
    method.check(network)
    select_parameters(network, loop.trainable)
    statistics = sweep.complete(statistics, method, network, lambda: source_batches(params, device))
    return device, network, checkpoint, method, loop, statistics
