"""How test images arrive: which shifts one stream leads through, and in what order their images come."""

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
    """A stretch of a stream in which the images of some shifts arrive in one order; batches do not reach beyond it.

    ``half``: 0 or 1 for one of two halves of the images; None: all of them.
    """

    shifts: tuple[Shift, ...]
    half: int | None = None

    @property
    def name(self) -> str:
        """Name the order; one shift's is the same in every stream."""
        first = self.shifts[0]
        return (
            f"{quote(first.name, safe=' ')}-0"
            if len(self.shifts) == 1
            else f"mixed-{first.severity}"
        )


@dataclass(frozen=True)
class Stream:
    """How test images arrive.

    Attributes:
        batch_size: most images of a batch; the batches of a visit differ by at most one image.
        order: ``shuffled``, as if drawn independently, or ``by_class``: one class after another, the hardest correlation of
            labels there is (Boudiaf et al., CVPR 2022, arXiv 2201.05718, and Gong et al., NeurIPS 2022, arXiv 2208.05117, test
            on such streams).
        shifts: ``separate``: each is a stream of its own, from the source weights on; ``continual``: those of one severity
            follow each other in one stream without a reset (Wang et al., CVPR 2022, arXiv 2203.13591); ``gradual``: one
            stream leads through all, each corruption swelling from its lowest severity to its highest and back, with half of
            the images of the lower ones on either way; ``mixed``: those of one severity arrive shuffled together. The clean
            images are always a stream of their own, so that their accuracy tells the price of one shift alone.
    """

    batch_size: int = 64
    order: Literal["shuffled", "by_class"] = "shuffled"
    shifts: Literal["separate", "continual", "gradual", "mixed"] = "separate"

    def routes(self, shifts: Sequence[Shift]) -> list[tuple[Visit, ...]]:
        """Divide the shifts into streams, each a sequence of visits; every image of every shift arrives once."""
        alone = [(Visit((shift,)),) for shift in shifts if shift.clean or self.shifts == "separate"]
        others = [shift for shift in shifts if not shift.clean and self.shifts != "separate"]
        swelling = [shift for shift in others if shift.severity] if self.shifts == "gradual" else []
        rest = sorted(
            (shift for shift in others if shift not in swelling), key=lambda shift: shift.severity
        )
        together = [tuple(group) for _, group in groupby(rest, key=lambda shift: shift.severity)]
        if self.shifts == "mixed":
            return alone + [(Visit(group),) for group in together]
        continual = [tuple(Visit((shift,)) for shift in group) for group in together]
        return alone + ([swell(swelling)] if swelling else []) + continual

    def batches(self, visit: Visit, labels: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
        """List the batches of a visit in their order of arrival.

        Args:
            visit: of a route.
            labels: of the images of each of its shifts ``(N_i,)``; only ``by_class`` looks at them, and only to simulate who
                comes when.
            seed: the experiment's seed.

        Returns:
            arrays ``(n, 2)``: number of the shift within the visit, and place in its set.
        """
        known = [
            np.stack([np.full(len(own), number), np.arange(len(own))], axis=1)
            for number, own in enumerate(labels)
        ]
        order = self.arrange(np.concatenate(labels), seed, visit.name, visit.half)
        return (
            np.array_split(np.concatenate(known)[order], math.ceil(len(order) / self.batch_size))
            if len(order)
            else []
        )

    def arrange(
        self, labels: np.ndarray, seed: int, name: str, half: int | None = None
    ) -> np.ndarray:
        """Order images: their places among ``labels (N,)``, in their order of arrival.

        Args:
            labels: of all images.
            seed: the experiment's seed.
            name: of the order.
            half: which half of the images; None: all of them.

        Raises:
            UserError: the order needs labels that are not known.
        """
        if self.order == "by_class" and (labels < 0).any():
            raise UserError(
                "adapt.online.order: by_class needs the labels of all images, found images without; set shuffled"
            )
        order = numpy_generator(seed, "stream", name).permutation(len(labels))
        order = order if half is None else np.array_split(order, 2)[half]
        return (
            order if self.order == "shuffled" else order[np.argsort(labels[order], kind="stable")]
        )


def swell(shifts: Sequence[Shift]) -> tuple[Visit, ...]:
    """Lead through corruptions, in the order in which they first appear, each from its lowest severity up and back."""
    corruptions = dict.fromkeys(shift.corruption for shift in shifts)
    visits: list[Visit] = []
    for corruption in corruptions:
        *lower, top = sorted(
            (s for s in shifts if s.corruption == corruption), key=lambda shift: shift.severity
        )
        visits += (
            [Visit((shift,), 0) for shift in lower]
            + [Visit((top,))]
            + [Visit((shift,), 1) for shift in reversed(lower)]
        )
    return tuple(visits)
