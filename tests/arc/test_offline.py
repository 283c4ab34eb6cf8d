"""Training on the pairs of many tasks."""

import copy

import numpy as np
import pytest
import torch

from tests.arc.tiny import CANVAS, SIDE, auxiliaries, network, random_task
from tttlab.arc.offline import PairLoader, PairTrainer, gather, pair_terms, train
from tttlab.arc.tasks import unpadded
from tttlab.runtime.ranks import Alone
from tttlab.runtime.resuming import Work
from tttlab.training.optimisers import Recipe

TASKS = [random_task(seed, 2 + seed) for seed in range(3)]
DRAWN = [auxiliaries(seed) for seed in range(3)]
RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-2, clip=1.0, weight_decay=0.0)


def pairs():
    return gather(TASKS, DRAWN, SIDE)


def test_every_demonstration_is_there_under_every_auxiliary_task():
    made = pairs()
    assert made.count == 9
    assert len(made) == 3 * (2 + 3 + 4)
    number = 0
    for task, (of_task, drawn) in enumerate(zip(TASKS, DRAWN, strict=True)):
        for auxiliary, one in enumerate(drawn):
            for pair in of_task.demonstrations:
                assert made.auxiliary[number] == 3 * task + auxiliary
                for grid, expected in zip(made.grids[number].numpy(), pair, strict=True):
                    np.testing.assert_array_equal(unpadded(grid), one.apply(expected))
                number += 1


def seen(loader: PairLoader) -> list[tuple]:
    """List what an epoch shows, in order: the auxiliary task and the symbols of each canvas."""
    return [
        (int(auxiliary), tuple(symbols.flatten().tolist()))
        for batch in loader
        for auxiliary, symbols in zip(batch["auxiliary"], batch["symbols"], strict=True)
    ]


def test_an_epoch_shows_every_pair_once():
    loader = PairLoader(pairs(), CANVAS, 8, seed=0)
    loader.set_epoch(1)
    assert len(loader) == len(list(loader)) == 4
    counts = np.bincount([auxiliary for auxiliary, _ in seen(loader)], minlength=9)
    assert counts.tolist() == [2] * 3 + [3] * 3 + [4] * 3


def test_epochs_differ_and_the_same_epoch_is_the_same():
    loader, again = (PairLoader(pairs(), CANVAS, 8, seed=0) for _ in range(2))
    loader.set_epoch(1)
    first = seen(loader)
    loader.set_epoch(2)
    again.set_epoch(1)
    assert seen(again) == first != seen(loader)


def test_ranks_share_every_batch():
    alone = PairLoader(pairs(), CANVAS, 8, seed=0)
    shares = [PairLoader(pairs(), CANVAS, 8, seed=0, rank=rank, ranks=2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        together = torch.cat([part["auxiliary"] for part in parts])
        assert torch.equal(together, whole["auxiliary"])
    assert sorted(share.whole for share in shares[0].shares) == [6, 7, 7, 7]


def test_no_rank_is_left_without_a_pair():
    """27 pairs in batches of at most 13: not 13, 13 and a single one."""
    for rank in range(2):
        loader = PairLoader(pairs(), CANVAS, 13, seed=0, rank=rank, ranks=2)
        assert sum(len(batch["auxiliary"]) for batch in loader) == (15, 12)[rank]


def test_the_ranks_losses_make_the_loss_of_the_whole_batch():
    """It is a mean over pixels, of which a rank may have more than its share of the pairs."""
    net = network(9)
    alone = PairLoader(pairs(), CANVAS, 8, seed=0)
    ranks = [PairLoader(pairs(), CANVAS, 8, seed=0, rank=rank, ranks=3) for rank in range(3)]
    generator = torch.Generator()
    for number, (whole, *parts) in enumerate(zip(alone, *ranks, strict=True)):
        expected = pair_terms(net, whole, generator)["loss"]
        losses = [
            pair_terms(net, part, generator)["loss"] * loader.shares[number].weight
            for part, loader in zip(parts, ranks, strict=True)
        ]
        torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-6, atol=0)
        assert torch.stack(losses).std() > 1e-3 * expected


def test_batches_hold_pairs_of_about_the_same_length():
    tasks = [random_task(seed, 8) for seed in range(12)]
    loader = PairLoader(gather(tasks, [auxiliaries(s) for s in range(12)], SIDE), CANVAS, 8, seed=0)
    spread = [float(loader._lengths[batch].float().std()) for batch in loader._batches]
    assert np.mean(spread) < 0.8 * float(loader._lengths.float().std())


def trainer(work: Work | None = None) -> PairTrainer:
    return PairTrainer(Alone(torch.device("cpu")), seed=0, work=work, canvas=CANVAS)


def test_training_takes_the_steps_of_adamw_along_clipped_gradients():
    from tttlab.arc.canvas import Tokens
    from tttlab.arc.demonstrations import pixel_loss

    trained, slow = network(9), network(9)
    rows = train(trainer(), trained, pairs(), RECIPE, "offline")
    optimizer = torch.optim.AdamW(slow.parameters(), weight_decay=0.0)
    loader = PairLoader(pairs(), CANVAS, 8, seed=0)
    for epoch in range(1, 4):
        loader.set_epoch(epoch)
        losses = []
        for number, batch in enumerate(loader):
            step = (epoch - 1) * len(loader) + number
            for group in optimizer.param_groups:
                group["lr"] = RECIPE.learning_rate(step, len(loader))
            logits = slow(Tokens(*(batch[name] for name in Tokens._fields)))
            loss = pixel_loss(logits, batch["targets"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        assert rows[epoch]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    for name, value in trained.named_parameters():
        torch.testing.assert_close(value, dict(slow.named_parameters())[name], atol=1e-8, rtol=1e-6)
    assert rows[-1]["loss"] < rows[1]["loss"]


def test_a_killed_training_goes_on_with_the_same_numbers(tmp_path):
    whole = network(9)
    expected = train(trainer(), whole, pairs(), RECIPE, "offline")

    class Killed(Exception):
        pass

    class Mortal(PairLoader):
        def set_epoch(self, epoch):
            if epoch == 3:
                raise Killed
            super().set_epoch(epoch)

    class MortalTrainer(PairTrainer):
        def open_loader(self, pairs, task):
            return Mortal(pairs, CANVAS, task.recipe.batch_size, self.seed)

    folder = tmp_path / "work"

    def die():
        with Work(folder, "arc train") as work:
            mortal = MortalTrainer(Alone(torch.device("cpu")), seed=0, work=work, canvas=CANVAS)
            train(mortal, network(9), pairs(), RECIPE, "offline")

    with pytest.raises(Killed):
        die()
    with Work(folder, "arc train") as work:
        resumed = network(9, seed=5)  # its weights are replaced
        rows = train(trainer(work), resumed, pairs(), RECIPE, "offline")
    assert [row["loss"] for row in rows[1:]] == pytest.approx([row["loss"] for row in expected[1:]])
    for name, value in resumed.named_parameters():
        torch.testing.assert_close(value, copy.deepcopy(whole).get_parameter(name))
