"""The model as MLflow gives it: every form of images, and errors that say whose fault it was."""

import numpy as np
import pandas as pd
import pytest

from tests.helpers import bodies, served
from tttlab.runtime.group_size import TooLittleMemory
from tttlab.serving import loading
from tttlab.serving.invocations import refusal
from tttlab.tracking.store import quiet

with quiet():
    from mlflow.exceptions import MlflowException

TEXT = bodies.encoded(bodies.GOOD)
PIXELS = np.full((20, 20, 3), (90, 30, 200), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    wrapped = loading.wrap(served.written(folder), folder / "mlflow")
    return loading.load(wrapped, folder, {"images": 3})


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (pd.DataFrame({"image": [TEXT, TEXT]}), 2),
        (pd.DataFrame({"image": [bodies.GOOD]}), 1),
        (pd.DataFrame({"image": [PIXELS, PIXELS.tolist()]}), 2),
        ({"image": [TEXT, TEXT]}, 2),
        ({"image": TEXT}, 1),
        ({"image": [bodies.GOOD]}, 1),
        ([{"image": TEXT}, {"image": TEXT}], 2),
        ({"image": np.stack([PIXELS, PIXELS])}, 2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_every_form_of_images_gets_the_same_answer(given, count, model):
    (expected,) = model.unwrap_python_model().service.answer([PIXELS])
    rows = model.predict(given)
    assert len(rows) == count
    for row in rows:
        for name in ("probabilities", "source_probabilities"):
            assert row[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize(
    ("given", "params", "code", "line"),
    [
        ({"image": []}, {}, "INVALID_PARAMETER_VALUE", "found one of shape (0,)"),
        ({"image": [TEXT] * 4}, {}, "INVALID_PARAMETER_VALUE", "expected 1 to 3 images, found 4"),
        ([{"image": "***"}], {}, "INVALID_PARAMETER_VALUE", "image 1: expected an image in base64"),
        ([{"image": TEXT}], {"run": "tent"}, "INVALID_PARAMETER_VALUE", "adapts along a stream"),
        ([{"image": TEXT}], {"steps": 99}, "INVALID_PARAMETER_VALUE", "from 0 to 50, found 99"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_is_the_clients(given, params, code, line, model):
    with pytest.raises(MlflowException) as caught:
        model.predict(given, params=params)
    assert caught.value.error_code == code
    assert line in caught.value.message


@pytest.mark.filterwarnings("ignore")
def test_a_failure_is_not(model, monkeypatch):
    service = model.unwrap_python_model().service
    monkeypatch.setattr(service._batcher, "_work", lambda kind, items: [][1])
    with pytest.raises(MlflowException, match="the model failed: list index out of") as caught:
        model.predict([{"image": TEXT}])
    assert caught.value.error_code == "INTERNAL_ERROR"


@pytest.mark.filterwarnings("ignore")
def test_too_little_memory_is_the_servers(model, monkeypatch):
    def too_little(_kind, _items):
        raise TooLittleMemory("one image does not fit into the memory of cpu")

    monkeypatch.setattr(model.unwrap_python_model().service._batcher, "_work", too_little)
    with pytest.raises(MlflowException, match="does not fit into the memory") as caught:
        model.predict([{"image": TEXT}])
    assert caught.value.get_http_status_code() == 503
    assert refusal(TooLittleMemory("too little"))[0] == 503


def test_another_kind_of_model_is_refused(tmp_path):
    from tttlab.errors import UserError

    with pytest.raises(UserError, match=r"nothing: expected a model of MLflow, found none \("):
        loading.load(str(tmp_path / "nothing"), tmp_path, {})
