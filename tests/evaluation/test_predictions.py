import pandas as pd
import pytest

from tests.evaluation.test_metrics import TABLE
from tttlab.errors import UserError
from tttlab.evaluation.predictions import read_predictions


def test_returns_what_was_written(tmp_path):
    TABLE.to_parquet(tmp_path / "run.parquet")
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "run.parquet"), TABLE)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"run\.parquet.*found no file"):
        read_predictions(tmp_path / "run.parquet")


def test_missing_columns(tmp_path):
    TABLE.drop(columns=["seed", "gate_open"]).to_parquet(tmp_path / "run.parquet")
    with pytest.raises(UserError, match="none named seed, gate_open; run `make repro` again"):
        read_predictions(tmp_path / "run.parquet")


def test_an_image_twice(tmp_path):
    pd.concat([TABLE, TABLE.tail(1)]).to_parquet(tmp_path / "run.parquet")
    with pytest.raises(UserError, match="image-3 twice under fog-5 with seed 0"):
        read_predictions(tmp_path / "run.parquet")


def test_an_image_once_per_seed(tmp_path):
    both = pd.concat([TABLE, TABLE.assign(seed=1)], ignore_index=True)
    both.to_parquet(tmp_path / "run.parquet")
    assert len(read_predictions(tmp_path / "run.parquet")) == 24
