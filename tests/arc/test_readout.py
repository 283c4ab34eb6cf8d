"""Reading answers off the canvas, and how much room is made for them."""

import numpy as np
import torch

from tests.arc.tiny import CANVAS, SIDE, auxiliaries, grid, network
from tttlab.arc.canvas import BORDER, SYMBOLS, UNASKED, Canvas
from tttlab.arc.demonstrations import as_array
from tttlab.arc.readout import GridReadout, read_grids, room_for_answers
from tttlab.arc.tasks import EMPTY, ArcTask, Pair, padded, unpadded
from tttlab.config.inner_loop import InnerLoop
from tttlab.networks.network import Bound
from tttlab.seeding import torch_generator


def cells_of(*rows: str) -> torch.Tensor:
    """Make probabilities ``(1, G + 1, G + 1, symbols)`` that show these rows; ``b``: the border."""
    shown = torch.full((SIDE + 1, SIDE + 1), 7)
    for row, symbols in enumerate(rows):
        for column, symbol in enumerate(symbols):
            shown[row, column] = BORDER if symbol == "b" else int(symbol)
    return torch.nn.functional.one_hot(shown, SYMBOLS).double()[None]


def test_the_border_ends_a_grid():
    read = read_grids(cells_of("12b", "34b", "bbb"))[0]
    assert unpadded(read.numpy()).tolist() == [[1, 2], [3, 4]]
    assert (read != EMPTY).sum() == 4


def test_a_grid_without_border_fills_the_side():
    assert (read_grids(cells_of("1"))[0] != EMPTY).all()


def test_a_border_at_the_first_cell_is_no_grid():
    assert (read_grids(cells_of("b"))[0] == EMPTY).all()


def test_border_and_background_within_a_grid_become_the_likeliest_colour():
    cells = cells_of("12b", "34b", "bbb")
    cells[0, 1, 1] = 0.0
    cells[0, 1, 1, BORDER], cells[0, 1, 1, 5] = 0.6, 0.4
    cells[0, 0, 1, 10] = 2.0  # background, which no output shows
    assert unpadded(read_grids(cells)[0].numpy()).tolist() == [[1, 2], [3, 5]]


def room(*pairs: tuple[tuple[int, int], tuple[int, int]], question: tuple[int, int], side=SIDE):
    """Estimate the room for the answer from sizes of demonstrations and of the question."""
    shown = tuple(
        Pair(np.zeros(given, np.int8), np.zeros(asked, np.int8)) for given, asked in pairs
    )
    task = ArcTask("task", shown, (np.zeros(question, np.int8),))
    array = torch.from_numpy(as_array(task, auxiliaries()[:1], len(shown) + 1, 1, side))[None]
    height, width = room_for_answers(array, 1)
    return int(height), int(width)


def test_room_where_all_outputs_have_one_size():
    assert room(((3, 4), (2, 2)), ((4, 4), (2, 2)), question=(1, 2)) == (2, 2)


def test_room_where_outputs_and_inputs_have_one_ratio():
    assert room(((1, 2), (2, 2)), ((2, 3), (4, 3)), question=(2, 4)) == (4, 4)


def test_room_is_at_least_the_question_and_at_most_the_side():
    assert room(((1, 1), (1, 1)), ((2, 2), (1, 1)), question=(3, 3)) == (3, 3)
    assert room(((1, 1), (3, 3)), ((2, 2), (4, 4)), question=(3, 3)) == (4, 4)


def test_every_question_is_asked_under_every_auxiliary_task_as_often_as_wished():
    drawn = auxiliaries()
    demonstration = Pair(grid("12", "34"), grid("21", "43"))
    task = ArcTask("task", (demonstration,), (grid("123"), grid("4", "5")))
    array = torch.from_numpy(as_array(task, drawn, 1, 2, SIDE))[None]
    readout = GridReadout(CANVAS, 2, SIDE, placements=2)
    tokens, placement = readout.looks(array, InnerLoop(), [torch_generator(0, "average", "task")])
    assert tokens.auxiliary.tolist() == [[0, 0, 1, 1, 2, 2] * 2]
    canvases = CANVAS.pixels(tokens.symbols[0])
    for view in range(12):
        question, auxiliary = divmod(view, 6)[0], tokens.auxiliary[0, view]
        expected = drawn[auxiliary].apply(task.questions[question])
        scale, top, left = (int(values[0, view]) for values in placement)
        height, width = expected.shape
        shown = canvases[
            view, top : top + height * scale : scale, left : left + width * scale : scale
        ]
        np.testing.assert_array_equal(shown.numpy(), expected)
        assert tokens.visible[0, view].any()


def test_a_network_that_draws_the_answer_is_read_exactly():
    canvas = Canvas(side=12, patch=2, largest_scale=2)
    drawn, answer = auxiliaries(), grid("123", "456")
    task = ArcTask("task", (Pair(grid("12"), grid("213", "000")),), (grid("12", "34"),))
    array = torch.from_numpy(as_array(task, drawn, 1, 1, SIDE))[None]
    readout = GridReadout(canvas, 1, SIDE, placements=4)
    looks = readout.looks(array, InnerLoop(), [torch_generator(0, "average", "task")])
    tokens, placement = (type(part)(*(values[0] for values in part)) for part in looks)
    assert set(placement.scale.tolist()) == {1, 2}
    answers = padded([drawn[number].apply(answer) for number in tokens.auxiliary], SIDE)
    targets = canvas.draw_targets(torch.from_numpy(answers), placement)

    def draw_answer(_tokens):
        shown = canvas.patches(torch.where(targets == UNASKED, 3, targets))
        return 50 * torch.nn.functional.one_hot(shown, SYMBOLS).double()

    grids = readout.read(draw_answer, (tokens, placement), None, None, {})
    for view, cells in enumerate(grids.numpy().astype(np.int8)):
        back = drawn[tokens.auxiliary[view]].invert(unpadded(cells))
        np.testing.assert_array_equal(back, answer)


def test_the_network_is_called_with_each_views_own_token():
    net = network(3)
    drawn = auxiliaries()
    task = ArcTask("task", (Pair(grid("12"), grid("21")),), (grid("1"),))
    array = torch.from_numpy(as_array(task, drawn, 1, 1, SIDE))[None]
    readout = GridReadout(CANVAS, 1, SIDE)
    looks = readout.looks(array, InnerLoop(), [torch_generator(0, "average", "task")])
    first = tuple(type(part)(*(values[0] for values in part)) for part in looks)
    before = readout.read(Bound(net, {}), first, None, None, {})
    net.auxiliary.weight.data[1:] *= -5.0
    after = readout.read(Bound(net, {}), first, None, None, {})
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1:], after[1:])
