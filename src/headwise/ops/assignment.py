"""Matching one set to another: the Hungarian method, from scipy (extra: tasks)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["match"]


def match(cost: Float[Tensor, "n k"], *, maximise: bool = False) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Rows and columns of the pairs with the least total cost, p = min(n, k), rows ascending.

    Raises ValueError where a cost is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if not torch.isfinite(cost).all():
        raise ValueError("match: cost holds values that are not finite")
    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy(), maximize=maximise)
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)
