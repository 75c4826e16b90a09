"""Softmax over a set of keys from the softmaxes over its parts.

A part of the keys is summed up by its output and its log-mass, the log-sum-exp of its scores: the whole is
out = sum_i exp(m_i - m) out_i with m = log sum_i exp(m_i). Nothing is subtracted from a total, so nothing cancels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["log_sum_exp", "merge"]


def log_sum_exp(x: Tensor, dim: int = -1, *, keepdim: bool = False) -> Tensor:
    """log sum exp(x); -inf where all of x is -inf, with gradient 0 there (torch's is nan)."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.logsumexp(dim, keepdim=keepdim)
    empty = (x == -torch.inf).all(dim, keepdim=True)
    total = x.masked_fill(empty, 0).logsumexp(dim, keepdim=True).masked_fill(empty, -torch.inf)
    return total if keepdim else total.squeeze(dim)


def merge(
    outs: Sequence[Float[Tensor, "*b t e"]], log_masses: Sequence[Float[Tensor, "*b t"]]
) -> tuple[Float[Tensor, "*b t e"], Float[Tensor, "*b t"]]:
    """Join attention over disjoint parts of the keys: (output, log-mass) of their union.

    A part of log-mass -inf counts for nothing, whatever its output holds, and receives gradient 0; a row with nothing
    but such parts has output 0 and log-mass -inf. A part of log-mass +inf takes the row (several share it evenly).
    Sums in the dtype of the log-masses; the output has the dtype of the first part.
    Raises ValueError when there is no part, or not one log-mass for each output.

    >>> whole, mass = merge([torch.tensor([[1.0]]), torch.tensor([[3.0]])], [torch.zeros(1), torch.zeros(1)])
    >>> whole.item(), round(mass.exp().item(), 3)
    (2.0, 2.0)
    """
    if not outs or len(outs) != len(log_masses):
        raise ValueError(
            f"merge: {len(outs)} outputs and {len(log_masses)} log-masses; give one of each for at least one part"
        )
    masses = torch.stack(list(log_masses), -1)
    endless = masses == torch.inf
    taken = endless.any(-1, keepdim=True)
    masses = torch.where(taken, torch.zeros_like(masses).masked_fill(~endless, -torch.inf), masses)
    absent = masses == -torch.inf
    top = masses.detach().amax(-1, keepdim=True)
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0)
    weights = torch.exp(masses - top)
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
    shares = weights / total
    out = torch.zeros((), dtype=masses.dtype, device=masses.device)
    for i, part in enumerate(outs):
        # An absent part may hold anything, NaN included: 0 * NaN would spread it.
        out = out + shares[..., i, None] * part.masked_fill(absent[..., i, None], 0)
    mass = (total.log() + top).masked_fill(empty, -torch.inf).masked_fill(taken, torch.inf)[..., 0]
    return out.to(outs[0].dtype), mass
