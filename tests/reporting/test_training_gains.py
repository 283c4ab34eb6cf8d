"""The picture of docs/when_it_helps.md: it says what the page's table says."""

import pytest
from PIL import Image

from tools import training_gains as tool
from tools.stage_code import ROOT
from tttlab.errors import UserError

TABLE = """\
Text with | a bar and 1.0.

| images, network | method | by training | whole gain | best control |
| --- | --- | --- | --- | --- |
| digits, ResNet ([in depth](results.md#x)) | `memo` | +4.2 [−3.0, +5.3] | +9.3 | `bn_views` +9.7 |
| | `ssl` (MAE), `actmad` | +0.1, −0.1 | up to +1.1 | `bn` +0.5, +2.2 |
| CIFAR-10, [a ViT](results.md#y) | `memo` | −0.4 to +0.9 | the same | nothing, 0.0 |

| another | table |
| --- | --- |
| 1.0 | 2.0 |
"""
ROWS = [
    tool.Row("digits, ResNet", "memo", (4.2,), (-3.0, 5.3), (9.3,), "bn_views", (9.7,)),
    tool.Row("digits, ResNet", "ssl (MAE), actmad", (0.1, -0.1), (), (1.1,), "bn", (0.5, 2.2)),
    tool.Row("CIFAR-10, a ViT", "memo", (-0.4, 0.9), (), (-0.4, 0.9), "nothing", (0.0,)),
]


def test_the_table_is_read():
    assert tool.read_rows(TABLE) == ROWS


def test_a_page_without_the_table_is_refused():
    with pytest.raises(UserError, match=r"expected a table with the head .* found none"):
        tool.read_rows(TABLE.replace("whole gain", "gain"))


def test_every_number_is_drawn():
    left, right = tool.draw(ROWS).axes
    first, second, third = left.get_yticks()
    assert [text.get_text() for text in left.get_yticklabels()] == [row.method for row in ROWS]
    assert first < second < third  # from the top down
    assert left.get_ylim()[0] > third
    points, lines = drawn(left)
    assert points["o"] == {(4.2, first), (0.1, second), (-0.1, second), (-0.4, third), (0.9, third)}
    assert lines == {((-3.0, 5.3), first), ((-0.1, 0.1), second), ((-0.4, 0.9), third)}
    points, lines = drawn(right)
    assert {x for x, _ in points["o"]} == {9.3, 1.1, -0.4, 0.9}
    assert {x for x, _ in points["D"]} == {9.7, 0.5, 2.2, 0.0}
    assert {ends for ends, _ in lines} == {(0.5, 2.2), (-0.4, 0.9)}
    assert {"bn_views", "bn", "nothing"} == {text.get_text() for text in right.texts}
    assert {"digits, ResNet", "CIFAR-10, a ViT"} == {text.get_text() for text in left.texts}


def drawn(axes):
    """Give the points by their marker, and the ends and the height of every level line."""
    points, lines = {}, set()
    for line in axes.lines:
        x, y = (list(values) for values in line.get_data())
        if line.get_marker() != "None":
            points.setdefault(line.get_marker(), set()).update(zip(x, y, strict=True))
        elif x[0] != x[-1]:
            lines.add((tuple(x), y[0]))
    return points, lines


def test_the_picture_is_of_todays_table():
    rows = tool.read_rows((ROOT / tool.PAGE).read_text(encoding="utf-8"))
    with Image.open(ROOT / tool.PICTURE) as picture:
        drawn_rows = picture.info["digest"]
    assert drawn_rows == tool.digest(rows), "run python -m tools.training_gains"


def test_every_row_of_the_page_has_all_numbers():
    rows = tool.read_rows((ROOT / tool.PAGE).read_text(encoding="utf-8"))
    assert len(rows) >= 20
    for row in rows:
        assert row.images
        assert row.method
        assert row.control
        assert row.training
        assert row.gain
        assert row.control_gain
        if row.interval:
            (training,), (low, high) = row.training, row.interval
            assert low <= training <= high
