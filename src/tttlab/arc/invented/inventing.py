"""Invented tasks, as many pairs of each as one likes: training tasks beside ARC's own few pairs.

Published work trains on a thousand generated pairs of every training task (RE-ARC), which no
package ships. These rules are our own, of general kinds: moving, filling, counting, mirroring.
"""

import numpy as np

from tttlab.arc.invented import moving, painting, recolouring, resizing
from tttlab.arc.tasks import ArcTask, Pair
from tttlab.seeding import numpy_generator

RULES = (*recolouring.RULES, *moving.RULES, *painting.RULES, *resizing.RULES)
_TRIES = 20  # for each pair


def invent(count: int, pairs: int, largest: int, seed: int) -> list[ArcTask]:
    """Invent tasks, the rules in turn.

    Args:
        count: tasks.
        pairs: demonstrations of each.
        largest: cells along a side of a grid, at most.
        seed: of all random streams.
    """
    return [invent_one(number, pairs, largest, seed) for number in range(count)]


def invent_one(number: int, pairs: int, largest: int, seed: int) -> ArcTask:
    """Draw one task until it has as many pairs as wanted, all different, hardly any trivial."""
    rule = RULES[number % len(RULES)]
    generator = numpy_generator(seed, "invented", number)
    while True:
        make, found = rule(generator, largest), {}
        for _ in range(_TRIES * pairs):
            pair = Pair(*(np.ascontiguousarray(grid, np.int8) for grid in make(generator)))
            trivial = pair.input.shape == pair.output.shape and (pair.input == pair.output).all()
            if not trivial and pair.input.any() and pair.longest_side <= largest:
                found[pair.input.tobytes() + bytes(pair.input.shape)] = pair
            if len(found) == pairs:
                return ArcTask(f"invented-{rule.__name__}-{number}", tuple(found.values()), ())
