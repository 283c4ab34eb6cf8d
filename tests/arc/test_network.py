"""The transformer: against a slow path, and what may not matter."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.arc.tiny import CANVAS, SIDE, network, random_task
from tttlab.arc.canvas import UNASKED, Canvas, sizes
from tttlab.arc.demonstrations import draw_pairs, pixel_loss
from tttlab.arc.tasks import padded


def draw(canvas=CANVAS, seed=0, count=6):
    """Draw the demonstrations of random tasks: pairs ``(N, 2, G, G)``, and their tokens."""
    pairs = [pair for number in range(count // 3) for pair in random_task(number).demonstrations]
    grids = torch.stack([torch.from_numpy(padded(pair, SIDE)) for pair in pairs])
    draws = torch.rand(len(grids), 3, generator=torch.Generator().manual_seed(seed))
    auxiliary = torch.arange(len(grids)) % 3
    return grids, draws, draw_pairs(canvas, grids, auxiliary, draws)


def slow_attention(block, x, attended, table):
    """Attend with loops over heads and tokens; ``table``: the angles ``(L, D/heads/2)``."""
    width = x.shape[-1]
    query, key, value = (block.qkv(x)).split(width, dim=-1)
    size = width // block.heads
    mixed = torch.zeros_like(x)
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)

        def turn(vectors):
            first, second = vectors[..., ::2], vectors[..., 1::2]
            sine, cosine = table.sin(), table.cos()
            pairs = [first * cosine - second * sine, second * cosine + first * sine]
            return torch.stack(pairs, -1).flatten(-2)

        q, k, v = turn(query[:, part]), turn(key[:, part]), value[:, part]
        for token in range(len(x)):
            scores = (k @ q[token]) / math.sqrt(size)
            weights = torch.where(attended, scores, -torch.inf).softmax(0)
            mixed[token, part] = weights @ v
    return block.proj(mixed)


def slow_logits(net, tokens, number):
    """Run the network on one canvas, token by token."""
    places = tokens.positions[number]
    across = net.canvas.side // net.canvas.patch
    quarter = net.architecture.width // net.architecture.heads // 4
    frequencies = 1 / 10_000 ** (torch.arange(quarter).double() / quarter)
    rows, columns = places // across, places % across
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    table = torch.cat([torch.zeros(1, 2 * quarter), angles])  # the task token is nowhere
    embedded = torch.cat(
        [net.symbols.weight[symbols].flatten()[None] for symbols in tokens.symbols[number]]
    )
    x = net.patch(embedded) + net.positions.weight[places]
    x = torch.cat([net.auxiliary.weight[tokens.auxiliary[number]][None], x])
    attended = torch.cat([torch.tensor([True]), tokens.visible[number]])
    for block in net.blocks:
        if block.post:
            x = block.norm1(x + slow_attention(block, x, attended, table))
            x = block.norm2(x + block.mlp(x))
        else:
            x = x + slow_attention(block, block.norm1(x), attended, table)
            x = x + block.mlp(block.norm2(x))
    return net.head(net.norm(x[1:])).unflatten(-1, (net.canvas.patch**2, -1))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_network_equals_a_slow_path(norm):
    net = network(3, norm=norm)
    _, _, (tokens, _) = draw()
    logits = net(tokens)
    for number in range(len(logits)):
        slow = slow_logits(net, tokens, number)
        # timm's sines and cosines are in single precision.
        torch.testing.assert_close(logits[number], slow, atol=1e-6, rtol=1e-5)


def test_tokens_that_are_left_out_change_nothing():
    canvas = Canvas(side=16, patch=2, largest_scale=2)
    net = network(3, canvas)
    grids, draws, (tokens, targets) = draw(canvas)
    heights, widths = sizes(grids)
    placement = canvas.draw_placement(heights.amax(1), widths.amax(1), draws)
    inputs = canvas.draw_inputs(grids[:, 0], placement)
    whole, _ = canvas.tokenise(inputs, tokens.auxiliary)
    assert tokens.positions.shape[1] < whole.positions.shape[1] == canvas.tokens
    index = tokens.positions[..., None, None].expand_as(net(tokens))
    torch.testing.assert_close(net(whole).gather(1, index), net(tokens))
    all_targets = canvas.patches(canvas.draw_targets(grids[:, 1], placement))
    assert (all_targets != UNASKED).sum() == (targets != UNASKED).sum()
    torch.testing.assert_close(
        pixel_loss(net(whole), all_targets), pixel_loss(net(tokens), targets)
    )


def test_the_loss_is_the_cross_entropy_of_the_asked_pixels():
    logits = torch.randn(2, 5, 4, 12, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.randint(0, 12, (2, 5, 4), generator=torch.Generator().manual_seed(1))
    targets[:, 1:3] = UNASKED
    expected = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=UNASKED)
    torch.testing.assert_close(pixel_loss(logits, targets), expected)
