"""ZeroTuning: scale the attention of every query to the first token, head by head, and renormalise.

    a_0' = gamma a_0 / D,  a_i' = a_i / D,  D = 1 + (gamma - 1) a_0

which is the same as adding log gamma to the score of key 0. gamma > 1 flattens what is left, gamma < 1 sharpens it;
because the first token is a sink the lever is long.

Paper: headwise/papers/zero_tuning.py (Han et al., 2025).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.edits import BiasGroup
from headwise.attend.groups import first_token
from headwise.steering.search import HeadSearch, search_heads

__all__ = ["ZeroTuning", "initial_token_bias", "scale_initial_token", "tune_initial_token"]

Gamma = float | Tensor | Mapping[Head, float]


@dataclass
class ZeroTuning(Edit):
    """Multiply the weight of the first token by gamma and renormalise.

    gamma: 0 or more; a number for all named heads, `[l, h]`, or a number for each head. At 1 nothing changes. A row
    that sees only the first token stays as it is. The first token is the first real one of each sequence: with padding
    on the left it is not column 0, and without a BOS token it is simply the first word.

    Notes: the authors' code takes a head number and edits that number in every layer, which is the selection "*.3"
    here; the paper's variant for fused kernels scales the key, which is another edit (it multiplies the score) and is
    not offered.

    >>> ZeroTuning(gamma=1.0).neutral
    True
    """

    gamma: Gamma = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = _smallest(self.gamma)
        if not smallest >= 0 or math.isnan(smallest):
            raise ValueError(f"ZeroTuning: gamma is {self.gamma}; it must be 0 or more (1 changes nothing)")
        if isinstance(self.gamma, Mapping) and self.heads is None:
            self.heads = list(self.gamma)

    @property
    def neutral(self) -> bool:
        return self.primitives()[0].neutral

    def primitives(self) -> tuple[Edit, ...]:
        return (BiasGroup(first_token(), initial_token_bias(self.gamma), heads=self.heads, when=self.when),)


def initial_token_bias(gamma: Gamma) -> float | Tensor | dict[Head, float]:
    """What is added to the score of the first token: log gamma, -inf at 0."""
    if isinstance(gamma, Tensor):
        return gamma.double().log().float()
    if isinstance(gamma, Mapping):
        return {head: _log(value) for head, value in gamma.items()}
    return _log(gamma)


def scale_initial_token(
    weights: Float[Tensor, "... s"], gamma: float | Float[Tensor, "..."], index: int = 0
) -> Float[Tensor, "... s"]:
    """The edit on weights that were formed: `a_index` times gamma, rows renormalised.

    Rows whose other weights are all 0 stay as they are, for every gamma.
    """
    gamma = torch.as_tensor(gamma, dtype=weights.dtype, device=weights.device)[..., None]
    first = torch.nn.functional.one_hot(torch.tensor(index), weights.shape[-1]).bool().to(weights.device)
    scaled = torch.where(first, weights * gamma, weights)
    total = scaled.sum(-1, keepdim=True)
    others = torch.where(first, 0, weights).sum(-1, keepdim=True)
    return torch.where((others > 0) & (total > 0), scaled / total.clamp_min(torch.finfo(weights.dtype).tiny), weights)


def tune_initial_token(
    model: torch.nn.Module,
    score: Callable[[], Tensor],
    held_out: Callable[[], Tensor],
    *,
    gammas: tuple[float, ...] = (0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 4.0),
    probe: float = 1.5,
    heads: str | None = None,
    seed: int = 0,
) -> HeadSearch:
    """Choose heads and one gamma for them, as the paper does, and measure the choice on prompts it has not seen.

    Every head is tried alone with gamma `probe`: it is up-effective if that raises the mean score, down-effective if
    `1 / probe` does. The kind whose heads gain more together is tuned with one gamma over the grid.

    score, held_out: run the model and return one number a prompt, larger is better: accuracy or log-likelihood of the
    right answer (supervised), or minus the entropy of the next token on prompts without labels (the paper's
    unsupervised form). score runs on the calibration prompts, held_out on others.
    """
    if not all(gamma >= 0 for gamma in gammas) or not gammas:
        raise ValueError(f"tune_initial_token: gammas are {gammas}; give at least one, all 0 or more")
    if not probe > 1:
        raise ValueError(f"tune_initial_token: probe is {probe}; it must be above 1 (its inverse is tried as well)")
    searches = [
        search_heads(
            model,
            lambda chosen, gamma=gamma: ZeroTuning(gamma=gamma, heads=chosen),
            score,
            held_out,
            candidates=heads,
            strengths=side,
            seed=seed,
        )
        for gamma, side in ((probe, [g for g in gammas if g > 1]), (1 / probe, [g for g in gammas if g < 1]))
        if side
    ]
    return max(searches, key=lambda found: found.calibration_gain)


def _log(gamma: float) -> float:
    return math.log(gamma) if gamma > 0 else -math.inf


def _smallest(gamma: Gamma) -> float:
    if isinstance(gamma, Mapping):
        return min(gamma.values(), default=1.0)
    return float(gamma.min()) if isinstance(gamma, Tensor) else float(gamma)
