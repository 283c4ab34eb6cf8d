"""SAR: be sure of the reliable test images, in a flat minimum, and start again before collapsing.

Niu et al., ICLR 2023, arXiv 2302.12400: images whose entropy exceeds a share of the largest
possible one are left out. The step is sharpness-aware (in params.yaml the adapter's
``sharpness: 0.05``). If the moving average of the loss falls below a threshold, which announces the
collapse to one class, the weights go back to the source's. The paper does not train the last
stage's normalisation layers: name the others in ``trainable`` for that.

What differs: in the second gradient of a step, at the upper point, ours takes the images that are
reliable there. The paper's formula takes those reliable at the weights themselves, its code those
reliable at both. The published code returns the predictions before the step; ours are made after
it.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from tttlab.adaptation.method import Method, State, entropy
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class SAR(Method):
    """Minimise the entropy of reliable predictions, and recover.

    Attributes:
        margin: share of log K, the largest entropy, beyond which an image is left out.
        reset_below: moving average of the loss, in nats, below which the weights go back to the
            source's; 0: never.
        memory: share of the old average in the new one.
    """

    protocols = ("online",)
    whole_batch = True
    margin: Annotated[float, Gt(0)] = 0.4
    reset_below: Annotated[float, Ge(0)] = 0.2
    memory: Annotated[float, Ge(0), Lt(1)] = 0.9

    def init_state(self) -> State:
        """Give the moving average of the loss: NaN before the first one."""
        return torch.tensor(torch.nan)

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Entropy, in nats, mean over the reliable images; 0 if there is none.

        The images are ``views (N, 3, H, W)``.
        """
        logits = net(views).logits
        entropies = entropy(logits)
        reliable = (entropies < self.margin * math.log(logits.shape[-1])).to(entropies)
        loss = (entropies * reliable).sum() / reliable.sum().clamp_min(1)
        average = self.memory * state + (1 - self.memory) * loss.detach()
        average = torch.where(state.isnan(), loss.detach(), average)
        return loss, torch.where(reliable.any(), average, state)

    def after_step(
        self,
        parameters: dict[str, Tensor],
        source: dict[str, Tensor],
        state: State,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], State]:
        """Go back to the source weights where the network has become too sure."""
        if state < self.reset_below:
            return source, self.init_state()
        return parameters, state
