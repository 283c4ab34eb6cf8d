"""The training loop, on Lightning Fabric: any device and precision, and a killed training goes on where it was."""

import logging
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tttlab.data import ImageSet
from tttlab.devices import choose_device
from tttlab.errors import UserError
from tttlab.loaders import Views, open_loader
from tttlab.networks import Network
from tttlab.optimisers import Recipe, build_optimizer
from tttlab.resuming import Work
from tttlab.seeding import stream_seed, torch_generator

Loss = Callable[[Network, dict[str, Tensor], torch.Generator], dict[str, Tensor]]
Row = dict[str, float]  # one epoch of a curve


def open_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Choose where and how precisely to compute.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<number>``.
        precision: ``32``, ``bf16`` (mixed), or ``auto``: bf16 on a GPU that has it.

    Raises:
        UserError: the device is not there.
    """
    chosen = choose_device(device)
    mixed = precision == "bf16" or (precision == "auto" and chosen.type == "cuda" and torch.cuda.is_bf16_supported())
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on devices that were not asked for
        return Fabric(
            accelerator=chosen.type,
            devices=1 if chosen.index is None else [chosen.index],
            precision="bf16-mixed" if mixed else "32-true",
        )


@contextmanager
def training_only(network: Network, parts: Sequence[str]) -> Iterator[None]:
    """Freeze all parts of a network but the named ones (``encoder``, ``classifier``, ``head``)."""
    others = [
        parameter
        for name, part in network.named_children()
        for parameter in part.parameters()
        if name not in parts and parameter.requires_grad
    ]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        network.eval()


@dataclass(frozen=True)
class Task:
    """One training of some parts of a network.

    Attributes:
        name: tells several trainings of one piece of work apart.
        parts: ``encoder``, ``classifier``, ``head``; the others keep their parameters and buffers.
        loss: gives, from (network, batch, generator on the CPU), the terms to record; ``loss`` is minimised.
        views: the views that ``loss`` finds in a batch.
        recipe: length and optimiser.
        betas: of AdamW.
        measure: what to record after an epoch; called with 0 before the first.
    """

    name: str
    parts: Sequence[str]
    loss: Loss
    views: Mapping[str, Views]
    recipe: Recipe
    betas: tuple[float, float] = (0.9, 0.999)
    measure: Callable[[int], Row] = lambda _epoch: {}


@dataclass(frozen=True)
class Trainer:
    """How tasks are carried out.

    Attributes:
        fabric: device and precision.
        seed: the experiment's seed.
        workers: processes that augment.
        work: where unfinished work is kept; None keeps none.
        report: called with (name of the task, row) after every epoch.
    """

    fabric: Fabric
    seed: int
    workers: int = 0
    work: Work | None = None
    report: Callable[[str, Row], None] = lambda _name, _row: None

    def fit(self, network: Network, images: ImageSet, task: Task) -> list[Row]:
        """Train, in place, for all epochs of the recipe, or for those that a killed training had left.

        The network of the last epoch is kept: no epoch is chosen by its validation accuracy.

        Args:
            network: the network; ends in evaluation mode.
            images: what to train on.
            task: what to train, and how.

        Returns:
            a row per epoch, the first one for epoch 0: ``epoch``, the means of the loss's terms, ``lr``, what
            ``measure`` gave, and ``seconds``.

        Raises:
            UserError: the loss is no longer finite.
        """
        network.to(self.fabric.device)
        with training_only(network, task.parts):
            optimizer = build_optimizer(network, task.recipe, task.betas)
            state = self.work.load(task.name) if self.work else None
            if state:
                network.load_state_dict(state["network"])
                optimizer.load_state_dict(state["optimizer"])
                rows = state["rows"]
            else:
                rows = [{"epoch": 0, **task.measure(0)}]
                self.report(task.name, rows[0])
            if task.recipe.epochs:
                self._run_epochs(network, images, task, optimizer, rows)
        return rows

    def _run_epochs(
        self, network: Network, images: ImageSet, task: Task, optimizer: torch.optim.Optimizer, rows: list[Row]
    ) -> None:
        """Run the epochs that ``rows`` does not hold yet."""
        epochs, loader = task.recipe.epochs, self._open_loader(images, task)
        model, wrapped = self.fabric.setup(network, optimizer)
        done = (len(rows) - 1) * len(images)
        with tqdm(total=epochs * len(images), initial=done, unit="image", unit_scale=True, disable=None) as bar:
            for epoch in range(len(rows), epochs + 1):
                bar.set_description(f"{task.name} {epoch}/{epochs}")
                started = time.perf_counter()
                network.eval()
                for part in task.parts:
                    getattr(network, part).train()
                terms = self._run_epoch(model, wrapped, loader, task, epoch, bar)
                _check_finite(terms["loss"], task, epoch)
                row = {"epoch": epoch, **terms, **task.measure(epoch)}
                rows.append(row | {"seconds": time.perf_counter() - started})
                bar.set_postfix(loss=f"{terms['loss']:.3f}")
                self.report(task.name, rows[-1])
                if self.work and self.fabric.is_global_zero:
                    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
                    self.work.save(task.name, state)

    def _open_loader(self, images: ImageSet, task: Task) -> DataLoader:
        ranks = {"rank": self.fabric.global_rank, "ranks": self.fabric.world_size}
        size = task.recipe.batch_size
        # Not through fabric.setup_dataloaders: that counts epochs itself, from the start of the process.
        return open_loader(images, task.views, size, self.seed, workers=self.workers, **ranks)

    def _run_epoch(self, model: Any, optimizer: Any, loader: DataLoader, task: Task, epoch: int, bar: tqdm) -> Row:
        """Run one epoch; → the means of the loss's terms, and the last learning rate.

        All randomness is keyed by the epoch, so that a resumed training draws what an uninterrupted one would.
        """
        key = (task.name, epoch, self.fabric.global_rank)
        torch.manual_seed(stream_seed(self.seed, "dropout", *key))
        generator = torch_generator(self.seed, "masks", *key)
        loader.sampler.set_epoch(epoch)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        for step, batch in enumerate(loader, start=(epoch - 1) * len(loader)):
            lr = task.recipe.learning_rate(step, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms = task.loss(model, self.fabric.to_device(batch), generator)
            optimizer.zero_grad()
            self.fabric.backward(terms["loss"])
            optimizer.step()
            for term, value in terms.items():
                totals[term] += value.detach()
            bar.update(len(batch["labels"]) * self.fabric.world_size)
        return {term: (total / len(loader)).item() for term, total in totals.items()} | {"lr": lr}


def _check_finite(loss: float, task: Task, epoch: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"{task.name}: expected a finite loss, found {loss} in epoch {epoch}; "
            f"lower lr ({task.recipe.lr:g}) or raise warmup_epochs ({task.recipe.warmup_epochs})"
        )
