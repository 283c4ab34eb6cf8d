"""The training loop, in one process or on Lightning Fabric; a killed training resumes.

Several processes (ranks) divide every batch and take the same step, that of the whole batch. Only
the first rank measures, reports and saves unfinished work. All ranks read that work, so its folder
must be on a shared file system.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm import tqdm

from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.networks.network import Network
from tttlab.runtime.progress import open_bar
from tttlab.runtime.resuming import Work
from tttlab.seeding import stream_seed, torch_generator
from tttlab.training.loaders import UNCHANGED, Changes, Views, open_loader, reporting_lost_workers
from tttlab.training.optimisers import Recipe, build_optimizer

if TYPE_CHECKING:
    from tttlab.runtime.ranks import Processes

logger = logging.getLogger(__name__)

Loss = Callable[[Network, dict[str, Any], torch.Generator], dict[str, Tensor]]
Row = dict[str, float]  # one epoch of a curve


@contextmanager
def training_only(network: Network, parts: Sequence[str]) -> Iterator[None]:
    """Freeze all other parts of a network inside the context; afterwards it is in evaluation mode.

    Args:
        network: the network.
        parts: names of the parts to train (``encoder``, ``classifier``, ``head``, ``probe``).
    """
    frozen = [
        parameter
        for name, part in network.named_children()
        for parameter in part.parameters()
        if name not in parts and parameter.requires_grad
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        network.eval()


@dataclass(frozen=True)
class Task:
    """One training of some parts of a network.

    Attributes:
        name: distinguishes the trainings that one `Work` saves.
        parts: ``encoder``, ``classifier``, ``head``, ``probe``; all others keep their parameters
            and buffers.
        loss: function (network, batch, generator on the CPU) → terms to record, means over the
            batch; the term ``loss`` is minimised. The batch holds this rank's images, as ``share``
            (a `Share`) which part of the whole batch they are, and the ``epoch``, from 1.
        views: the views that a batch holds for ``loss``.
        recipe: length and optimiser.
        betas: of AdamW.
        changes: shares of the images that are changed in an epoch.
        measure: function (epoch) → values to record; called on the first rank after every epoch,
            and with 0 before the first.
    """

    name: str
    parts: Sequence[str]
    loss: Loss
    views: Mapping[str, Views]
    recipe: Recipe
    betas: tuple[float, float] = (0.9, 0.999)
    changes: Changes = UNCHANGED
    measure: Callable[[int], Row] = lambda _epoch: {}


@dataclass(frozen=True)
class Trainer:
    """Runs tasks.

    Attributes:
        fabric: device, precision and ranks.
        seed: the experiment's seed.
        workers: processes that augment.
        work: where unfinished work is saved; None: nowhere.
        report: called with (name of the task, row) after every epoch, on the first rank.
        title: names what is trained, for people.
        line: of the progress bar on the screen, from 0.
        unit: what is trained on, for people.
    """

    fabric: "Processes"
    seed: int
    workers: int = 0
    work: Work | None = None
    report: Callable[[str, Row], None] = lambda _name, _row: None
    title: str = ""
    line: int = 0
    unit: str = "image"

    def fit(self, network: Network, images: ImageSet, task: Task) -> list[Row]:
        """Train in place for all epochs of the recipe, or for those missing from a killed training.

        The network of the last epoch is kept: no epoch is chosen by its validation accuracy.

        Args:
            network: the network; ends in evaluation mode.
            images: what to train on.
            task: what to train, and how.

        Returns:
            a row per epoch, from epoch 0: ``epoch``, the means of the loss's terms, ``lr``, the
            values of ``measure`` (on the first rank), and ``seconds``.

        Raises:
            UserError: the loss is not finite, a process that augments was lost, or the ranks find
                different unfinished work.
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
                rows = [{"epoch": 0, **self._measure(task, 0)}]
                self._report(task, rows[0])
            self._check_rows(task, rows)
            if task.recipe.epochs:
                with reporting_lost_workers():
                    self._run_epochs(network, images, task, optimizer, rows)
        return rows

    def _measure(self, task: Task, epoch: int) -> Row:
        return task.measure(epoch) if self.fabric.is_global_zero else {}

    def _report(self, task: Task, row: Row) -> None:
        if self.fabric.is_global_zero:
            self.report(task.name, row)

    def _check_rows(self, task: Task, rows: list[Row]) -> None:
        """Fail if ranks would resume from different epochs: that would be a deadlock."""
        expected = self.fabric.broadcast(len(rows))
        differs = torch.tensor(float(len(rows) != expected), device=self.fabric.device)
        if count := int(self.fabric.all_reduce(differs, reduce_op="sum")):
            raise UserError(
                f"{task.name}: expected all processes to find the unfinished work "
                f"that the first one does ({expected - 1} epochs), "
                f"found other work on {count} of them; use a file system that all machines share"
            )

    def _run_epochs(
        self,
        network: Network,
        images: ImageSet,
        task: Task,
        optimizer: torch.optim.Optimizer,
        rows: list[Row],
    ) -> None:
        """Run the epochs that are missing in ``rows``."""
        epochs = task.recipe.epochs
        loader = self.open_loader(images, task)
        self._share_statistics(network, task)
        model, wrapped_optimizer = self.fabric.setup(network, optimizer)
        with open_bar(
            f"{task.name} {self.title}".rstrip(),
            epochs * len(images),
            self.unit,
            done=(len(rows) - 1) * len(images),
            line=self.line,
            hidden=not self.fabric.is_global_zero,
        ) as bar:
            for epoch in range(len(rows), epochs + 1):
                started = time.perf_counter()
                network.eval()
                for part in task.parts:
                    getattr(network, part).train()
                terms = self._run_epoch(model, wrapped_optimizer, loader, task, epoch, bar)
                _check_finite(terms["loss"], task, epoch)
                row = {"epoch": epoch, **terms, **self._measure(task, epoch)}
                rows.append(row | {"seconds": time.perf_counter() - started})
                loss = f"{terms['loss']:.3f}"
                bar.set_postfix(epoch=f"{epoch}/{epochs}", loss=loss, refresh=False)
                self._report(task, rows[-1])
                if self.work and self.fabric.is_global_zero:
                    state = {
                        "network": network.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "rows": rows,
                    }
                    self.work.save(task.name, state)

    def _share_statistics(self, network: Network, task: Task) -> None:
        """On GPUs, let BatchNorm use the whole batch; names in the state dict do not change.

        On CPUs torch has no such layer: every rank normalises with its own images' statistics. The
        next task starts from the first rank's running statistics.
        """
        if self.fabric.world_size == 1:
            return
        if self.fabric.device.type == "cuda":
            synchronise_batchnorm(network)
        elif self.fabric.is_global_zero and any(
            isinstance(module, _BatchNorm)
            for part in task.parts
            for module in getattr(network, part).modules()
        ):
            logger.warning(
                "%s: on CPUs each of the %d processes normalises (BatchNorm) "
                "with its own images' statistics; "
                "one process, or GPUs, would give other numbers",
                task.name,
                self.fabric.world_size,
            )

    def open_loader(self, images: ImageSet, task: Task) -> DataLoader:
        """Open the loader of all epochs; another kind of training data needs another one.

        It gives this rank's part of every batch; its ``sampler`` has ``set_epoch`` and ``shares``.
        """
        # Not fabric.setup_dataloaders: it counts epochs itself, from the start of the process.
        return open_loader(
            images,
            task.views,
            task.recipe.batch_size,
            self.seed,
            changes=task.changes,
            workers=self.workers,
            rank=self.fabric.global_rank,
            ranks=self.fabric.world_size,
        )

    def _run_epoch(
        self, model: Any, optimizer: Any, loader: DataLoader, task: Task, epoch: int, bar: tqdm
    ) -> Row:
        """Run one epoch; return the means of the loss's terms, and the last learning rate.

        All random streams depend on the epoch, so that resuming does not change what is drawn.
        """
        rank = self.fabric.global_rank
        torch.manual_seed(stream_seed(self.seed, "dropout", task.name, epoch, rank))
        # All ranks draw the masks of the whole batch from the same stream.
        generator = torch_generator(self.seed, "masks", task.name, epoch, 0)
        loader.sampler.set_epoch(epoch)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        steps = zip(loader, loader.sampler.shares, strict=True)
        for step, (batch, share) in enumerate(steps, start=(epoch - 1) * len(loader)):
            lr = task.recipe.learning_rate(step, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = self.fabric.to_device(batch) | {"share": share, "epoch": epoch}
            terms = task.loss(model, batch, generator)
            optimizer.zero_grad()
            # The ranks' gradients are averaged afterwards.
            self.fabric.backward(terms["loss"] * share.weight)
            if task.recipe.clip is not None:
                self.fabric.clip_gradients(model, optimizer, max_norm=task.recipe.clip)
            optimizer.step()
            for term, value in terms.items():
                totals[term] += value.detach() * share.weight
            bar.update(share.whole)
        means = {}
        for term, total in totals.items():
            means[term] = self.fabric.all_reduce(total / len(loader)).item()
        return means | {"lr": lr}


def synchronise_batchnorm(network: Network) -> None:
    """Replace BatchNorm by SyncBatchNorm, in place; a second call changes nothing."""
    # timm would lose the activation functions of layers that are already converted.
    if not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
        convert_sync_batchnorm(network)


def _check_finite(loss: float, task: Task, epoch: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"{task.name}: expected a finite loss, found {loss} in epoch {epoch}; "
            f"lower lr ({task.recipe.lr:g}) or raise warmup_epochs ({task.recipe.warmup_epochs})"
        )
