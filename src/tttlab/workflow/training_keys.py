"""Keys of trained networks: hashes of everything that a training depends on.

Nothing here imports torch, so that a stage whose networks are all there ends at once.
"""

from dataclasses import asdict
from pathlib import Path

from tttlab.adaptation.method_code import Code, module_code
from tttlab.config.models import Model
from tttlab.config.params import Params
from tttlab.config.values import is_own_module
from tttlab.networks.known_classes import SIDECAR
from tttlab.workflow import places
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import Network


def pretraining_key(params: Params, network: Network, ledger: Ledger) -> str:
    """Hash what a pretrained network depends on; validation images are only measured on."""
    model = params.models[network.model]
    section = model.model_dump(mode="json", exclude={"finetune"})
    images = _images("unlabeled", "labeled_train", "labeled_validation")
    settings = [*network, section, model.whole, params.data.image_size]
    code = backbone_code(model.backbone)
    return ledger.key([*settings, *filter(None, [code])], [*images, *_files_of(model)])


def _files_of(model: Model) -> list[Path]:
    """List the files that a network is taken from, with what timm wrote beside its weights."""
    folder = model.backbone.partition("local-dir:")[2]
    files = [Path(folder)] if folder else []
    if model.weights not in (None, "timm"):
        weights = Path(model.weights)
        files += [weights, *filter(Path.exists, [weights.with_name(SIDECAR)])]
    return files


def backbone_code(backbone: str) -> Code:
    """Hash the code of a network of one's own, ``my_package.my_network``; empty for timm's."""
    return module_code(backbone.rpartition(".")[0]) if is_own_module(backbone) else {}


def finetuning_key(params: Params, network: Network, ledger: Ledger) -> str:
    """Hash what a fine-tuned network depends on."""
    model = params.models[network.model]
    section = model.model_dump(mode="json", exclude={"pretrain"})
    views = asdict(model.pretrain.augment)
    pretrained = places.OUTPUTS / "pretrained" / str(network)
    images = _images("labeled_train", "labeled_validation")
    return ledger.key([*network, section, views], [pretrained, *images])


def statistics_key(params: Params, network: Network, ledger: Ledger) -> str:
    """Hash what the source statistics of a network depend on."""
    settings = [*network, params.seed, params.source_stats.model_dump(mode="json")]
    return ledger.key(
        settings, [places.OUTPUTS / "finetuned" / str(network), *_images("labeled_train")]
    )


def _images(*names: str) -> list[Path]:
    return [places.OUTPUTS / "data" / name for name in names]
