"""How test images arrive: which shifts a stream goes through, and in what order images come."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple
from urllib.parse import quote

import numpy as np

from tttlab.errors import UserError
from tttlab.seeding import numpy_generator
from tttlab.shifts.shift import Shift


class Visit(NamedTuple):
    """A stretch of a stream with the images of some shifts in one order; no batch crosses its end.

    Attributes:
        shifts: the shifts, whose images are shuffled together.
        half: 0 or 1 for one of two halves of the images; None: all of them.
    """

    shifts: tuple[Shift, ...]
    half: int | None = None

    @property
    def name(self) -> str:
        """Name of the order; a single shift has the same one in every stream."""
        first = self.shifts[0]
        if len(self.shifts) == 1:
            return f"{quote(first.name, safe=' ')}-0"
        return f"mixed-{first.severity}"


@dataclass(frozen=True)
class Stream:
    """How test images arrive.

    Attributes:
        batch_size: most images of a batch; the batches of a visit differ by at most one image.
        order: ``shuffled``, as if drawn independently, or ``by_class``: one class after another,
            the strongest correlation of labels. Boudiaf et al., CVPR 2022, arXiv 2201.05718, and
            Gong et al., NeurIPS 2022, arXiv 2208.05117, test on such streams.
        shifts: which shifts share a stream. The clean images are always a stream of their own, so
            that their accuracy shows the cost of adapting to them alone.
            ``separate``: each is a stream of its own, from the source weights on.
            ``continual``: shifts of one severity follow each other in one stream without a reset
            (Wang et al., CVPR 2022, arXiv 2203.13591).
            ``gradual``: one stream goes through all. Each corruption rises from its lowest severity
            to its highest and falls back; of the lower ones half of the images come on either way.
            ``mixed``: shifts of one severity arrive shuffled together.
    """

    batch_size: int = 64
    order: Literal["shuffled", "by_class"] = "shuffled"
    shifts: Literal["separate", "continual", "gradual", "mixed"] = "separate"

    def routes(self, shifts: Sequence[Shift]) -> list[tuple[Visit, ...]]:
        """Divide the shifts into streams, each a tuple of visits; every image arrives once."""
        alone = [(Visit((shift,)),) for shift in shifts if shift.clean or self.shifts == "separate"]
        joined = [shift for shift in shifts if not shift.clean and self.shifts != "separate"]
        swelling: list[Shift] = []
        if self.shifts == "gradual":
            swelling = [shift for shift in joined if shift.severity]
        by_severity = sorted(
            (shift for shift in joined if shift not in swelling), key=lambda shift: shift.severity
        )
        groups = [
            tuple(group) for _, group in groupby(by_severity, key=lambda shift: shift.severity)
        ]
        if self.shifts == "mixed":
            return alone + [(Visit(group),) for group in groups]
        continual = [tuple(Visit((shift,)) for shift in group) for group in groups]
        return alone + ([swell(swelling)] if swelling else []) + continual

    def batches(self, visit: Visit, labels: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
        """List the batches of a visit in their order of arrival.

        Args:
            visit: a visit of a route.
            labels: labels ``(N_i,)`` of the images of each of its shifts; only ``by_class`` uses
                them, and only for the order.
            seed: the experiment's seed.

        Returns:
            arrays ``(n, 2)``: number of the shift within the visit, and position in its set.
        """
        rows = [
            np.stack([np.full(len(of_shift), number), np.arange(len(of_shift))], axis=1)
            for number, of_shift in enumerate(labels)
        ]
        order = self.arrange(np.concatenate(labels), seed, visit.name, visit.half)
        if not len(order):
            return []
        return np.array_split(np.concatenate(rows)[order], math.ceil(len(order) / self.batch_size))

    def arrange(
        self, labels: np.ndarray, seed: int, name: str, half: int | None = None
    ) -> np.ndarray:
        """Order images: positions in ``labels``, in their order of arrival.

        Args:
            labels: labels ``(N,)`` of all images.
            seed: the experiment's seed.
            name: name of the order.
            half: which half of the images; None: all of them.

        Raises:
            UserError: the order needs labels that are not known.
        """
        if self.order == "by_class" and (labels < 0).any():
            raise UserError(
                "adapt.online.order: by_class needs the labels of all images, "
                "found images without; set shuffled"
            )
        order = numpy_generator(seed, "stream", name).permutation(len(labels))
        if half is not None:
            order = np.array_split(order, 2)[half]
        if self.order == "by_class":
            order = order[np.argsort(labels[order], kind="stable")]
        return order


def swell(shifts: Sequence[Shift]) -> tuple[Visit, ...]:
    """Go through the corruptions in order, each from its lowest severity up and back."""
    corruptions = dict.fromkeys(shift.corruption for shift in shifts)  # each once, in order
    visits: list[Visit] = []
    for corruption in corruptions:
        of_corruption = [shift for shift in shifts if shift.corruption == corruption]
        *lower, highest = sorted(of_corruption, key=lambda shift: shift.severity)
        visits += [Visit((shift,), 0) for shift in lower]
        visits.append(Visit((highest,)))
        visits += [Visit((shift,), 1) for shift in reversed(lower)]
    return tuple(visits)
