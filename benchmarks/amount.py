"""How much is measured: everything, or just enough to show that every benchmark works."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """Upper limits of what is measured.

    Attributes:
        images: images of a case or of a point of a sweep; also those the peers' way is timed on.
        steps: steps per image, S.
        repeats: how often all sides are timed.
        points: points of each sweep.
        photographs: photographs that are decoded, corrupted, augmented and trained on.
        head_steps: batches that train the head of torch-ttt's rotation engine.
        data_sets: simulated data sets per case of the coverage.
        resamples: resamples of each bootstrap of the coverage.
        requests: requests of each load on a server.
        served_images: different images among them.
    """

    images: int = 4096
    steps: int = 32
    repeats: int = 5
    points: int = 7
    photographs: int = 10_000
    head_steps: int = 100
    data_sets: int = 4_000
    resamples: int = 999
    requests: int = 2_000
    served_images: int = 200


FULL = Amount()
SMOKE = Amount(
    images=2,
    steps=2,
    repeats=2,
    points=2,
    photographs=32,
    head_steps=1,
    data_sets=200,
    resamples=99,
    requests=40,
    served_images=10,
)
