"""The place of attention in a transformer's block, with another layer inside.

Of every token x, learned linear maps make a query ψ x, a key φ x and a target (or value) g x for
each head. A rule (one of this room's layers) learns from keys and targets and answers the queries,
and another learned map, h, puts the heads' answers together.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.errors import UserError
from tttlab.mixers.descent import losses_along
from tttlab.runtime.precision import at_least_single, without_autocast


class TokenMixer(nn.Module):
    """A module with the calling form of timm's attention.

    What happens inside the rule happens in single precision at least, whatever autocast says: sums
    over the tokens and the inner steps would lose too much in bf16.

    Args:
        dim: D, width of the tokens.
        heads: H, a divisor of D.
        rule: what mixes the tokens of a head: of keys, targets and queries, ``(N, H, L, d)`` each,
            it makes answers of that shape.
        around: prefix tokens (class, registers) that are passed around the rule: it does not see
            them, and their answer is zero.
        drop: dropout of the output in training.
    """

    def __init__(
        self, dim: int, heads: int, rule: nn.Module, around: int = 0, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.around = heads, around
        self.maps = nn.Linear(dim, 3 * dim)  # ψ, φ and g, for all heads
        self.rule = rule
        self.output = nn.Linear(dim, dim)  # h
        self.drop = nn.Dropout(drop)
        # Tokens come normalised: so queries, keys and targets start with a variance of about 1.
        for part in (*self.maps.weight.detach().chunk(3), self.output.weight.detach()):
            nn.init.xavier_uniform_(part)
        for layer in (self.maps, self.output):
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens ``(N, L, D)``; with the arguments of timm's attention.

        Raises:
            UserError: a mask is asked for.
        """
        if attn_mask is not None or is_causal:
            raise UserError(
                f"mixer {type(self.rule).__name__} sees all tokens of an image and knows no mask; "
                "use mixer: {name: attention} where tokens are masked"
            )
        queries, keys, targets = self.split(x)
        with without_autocast(x.device.type):
            answers = self.rule(keys, targets, queries)
        if self.around:
            answers = F.pad(answers, (0, 0, self.around, 0))
        answers = answers.transpose(1, 2).flatten(2).to(x.dtype)
        return self.drop(self.output(answers))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map tokens ``(N, L, D)`` to queries, keys and targets, ``(N, H, L, d)`` each."""
        mapped = self.maps(x).unflatten(-1, (3, self.heads, -1))[:, self.around :]
        return at_least_single(mapped.permute(2, 0, 3, 1, 4)).contiguous().unbind()

    def inner_losses(self, x: Tensor, steps: int) -> Tensor:
        """Compute the inner loss after 0, 1, … ``steps`` steps on tokens ``(N, L, D)``.

        The rule must be a TTT layer.

        Returns:
            ``(steps + 1, N, H)``, means over the tokens.
        """
        _, keys, targets = self.split(x)
        with without_autocast(x.device.type):
            return losses_along(self.rule, keys, targets, steps)
