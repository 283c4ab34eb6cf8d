"""What MLflow copies into a model and runs to load it: no object is ever unpickled."""

from mlflow.models import set_model

from tttlab.serving.pyfunc import AdaptiveModel

set_model(AdaptiveModel())
