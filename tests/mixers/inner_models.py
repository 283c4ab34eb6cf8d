"""The inner models once more, in NumPy: one image, one head, one token after the other."""

import math
from collections.abc import Callable

import numpy as np

Weights = dict[str, np.ndarray]
EPSILON = 1e-5


def token_gradient(z: np.ndarray, v: np.ndarray, norm: bool) -> np.ndarray:
    """Differentiate ½ ‖LN(z) − v‖² by z, by the Jacobian of LN."""
    if not norm:
        return z - v
    width = len(z)
    deviation = math.sqrt(z.var() + EPSILON)
    normed = (z - z.mean()) / deviation
    jacobian = np.eye(width) - 1 / width - np.outer(normed, normed) / width
    return jacobian / deviation @ (normed - v)


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x])


def gelu_slope(x: np.ndarray) -> np.ndarray:
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x]) + x * density


class Linear:
    """f(k) = k W + b."""

    def output(self, w: Weights, tokens: np.ndarray, place: int) -> np.ndarray:
        return tokens[place] @ w["weight"] + w["bias"][0]

    def gradient(self, w: Weights, tokens: np.ndarray, place: int, by_z: np.ndarray) -> Weights:
        return {"weight": np.outer(tokens[place], by_z), "bias": by_z[None]}


class MLP:
    """f(k) = gelu(k W₁ + b₁) W₂ + b₂."""

    def output(self, w: Weights, tokens: np.ndarray, place: int) -> np.ndarray:
        hidden = gelu(tokens[place] @ w["weight_1"] + w["bias_1"][0])
        return hidden @ w["weight_2"] + w["bias_2"][0]

    def gradient(self, w: Weights, tokens: np.ndarray, place: int, by_z: np.ndarray) -> Weights:
        before = tokens[place] @ w["weight_1"] + w["bias_1"][0]
        by_before = w["weight_2"] @ by_z * gelu_slope(before)
        return {
            "weight_1": np.outer(tokens[place], by_before),
            "bias_1": by_before[None],
            "weight_2": np.outer(gelu(before), by_z),
            "bias_2": by_z[None],
        }


class Conv:
    """A depth-wise 3 × 3 convolution of a grid of some rows and columns."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def neighbours(self, place: int):
        row, column = divmod(place, self.columns)
        for i in range(3):
            for j in range(3):
                y, x = row + i - 1, column + j - 1
                if 0 <= y < self.rows and 0 <= x < self.columns:
                    yield i, j, y * self.columns + x

    def output(self, w: Weights, tokens: np.ndarray, place: int) -> np.ndarray:
        z = w["bias"][0].copy()
        for i, j, other in self.neighbours(place):
            z += w["weight"][:, i, j] * tokens[other]
        return z

    def gradient(self, w: Weights, tokens: np.ndarray, place: int, by_z: np.ndarray) -> Weights:
        by_weight = np.zeros_like(w["weight"])
        for i, j, other in self.neighbours(place):
            by_weight[:, i, j] += by_z * tokens[other]
        return {"weight": by_weight, "bias": by_z[None]}


def answers(
    model: Linear | MLP | Conv,
    weights: Weights,
    keys: np.ndarray,
    targets: np.ndarray,
    queries: np.ndarray,
    *,
    norm: bool,
    lr: float,
    batches: list[list[int]],
    scaled: bool,
) -> np.ndarray:
    """Train on the tokens ``(L, d)`` of one head, a step for each batch, and answer queries."""
    weights = {name: value.copy() for name, value in weights.items()}
    for batch in batches:
        total = {name: np.zeros_like(value) for name, value in weights.items()}
        for place in batch:
            by_z = token_gradient(model.output(weights, keys, place), targets[place], norm)
            for name, value in model.gradient(weights, keys, place, by_z).items():
                total[name] += value / len(batch)
        length = math.sqrt(sum((value**2).sum() for value in total.values()))
        for name in weights:
            weights[name] -= lr * total[name] / (length + 1 if scaled else 1)
    return np.stack([model.output(weights, queries, place) for place in range(len(queries))])


def of_every_head(answer: Callable[[int, int], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Put the answers of all images and heads together: ``(N, H, L, d)``."""
    found = np.zeros(shape)
    for image in range(shape[0]):
        for head in range(shape[1]):
            found[image, head] = answer(image, head)
    return found
