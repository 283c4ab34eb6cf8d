"""Random streams that depend on their key alone."""

import torch

from tttlab.seeding import global_stream


def test_a_lent_global_stream_is_the_seeds_and_given_back(monkeypatch):
    expected = torch.rand(3, generator=torch.Generator().manual_seed(11))
    before = torch.get_rng_state()

    def refuse(_seed):
        raise AssertionError("an accelerator's stream was changed, which nothing restores")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    with global_stream(11):
        assert torch.equal(torch.rand(3), expected)  # the very same draw, repeated
    assert torch.equal(torch.get_rng_state(), before)  # bytes, which are put back
