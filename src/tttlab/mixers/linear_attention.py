"""Linear attention: attention without softmax, so that the cost is linear in the number of tokens.

For each head, with a feature map m of keys and queries, the answer to a query is

    elu:        Σᵢ (m(q) · m(kᵢ)) vᵢ / Σᵢ m(q) · m(kᵢ),    m(x) = elu(x) + 1 > 0:
                a mean of the values, with weights that sum to 1;
    identity:   1/n Σᵢ (q · kᵢ) vᵢ,                        m(x) = x:
                divided by the number n of tokens alone, with weights of either sign.

Katharopoulos et al., ICML 2020, arXiv 2006.16236 (``elu``). The form ``identity`` is what one step
makes of TTT-Linear from zero weights (`tttlab.mixers.ttt_linear`).
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class LinearAttention(nn.Module):
    """Attention without softmax.

    Args:
        feature_map: ``elu`` or ``identity``.
    """

    def __init__(self, feature_map: Literal["elu", "identity"] = "elu") -> None:
        super().__init__()
        self.feature_map = feature_map

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Answer queries; all and the result ``(N, H, L, d)``."""
        if self.feature_map == "identity":
            return queries @ (keys.mT @ values) / keys.shape[-2]
        keys, queries = F.elu(keys) + 1, F.elu(queries) + 1
        total = queries @ keys.sum(-2, keepdim=True).mT
        return queries @ (keys.mT @ values) / total
