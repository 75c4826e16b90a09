"""Heads that are spread over processes: tensor parallelism as transformers and torch do it.

Each rank holds an equal, contiguous share of the query and key heads of a layer, and the output projection sums over
ranks. An edit acts on the rank that holds its heads. What is read is gathered, so that every rank sees all heads, as
one process would; therefore every rank must read the same things in the same order.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.errors import UnsupportedModel

__all__ = ["HeadShare", "gathered", "head_share", "is_sharded", "whole"]


@dataclass(frozen=True)
class HeadShare:
    """The part of a layer's heads that this process holds: the `rank`-th of `mesh.size()` equal parts."""

    mesh: Any
    """A one-dimensional `torch.distributed.DeviceMesh`."""

    @property
    def size(self) -> int:
        """How many processes share the heads."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """Which share is held here."""
        return self.mesh.get_local_rank()

    def applies(self, local: int, total: int, name: str) -> bool:
        """Whether `local` things (heads, features) of `total` are a share; False where all of them are here.

        Raises UnsupportedModel for any other number, such as that of uneven shares.
        """
        if local == total:
            return False
        if local * self.size != total:
            raise UnsupportedModel(
                f"{name}: this process holds {local} of {total} heads or features, which is no equal share among "
                f"{self.size}; use a number of processes that divides the heads"
            )
        return True

    def numbers(self, local: int) -> list[int]:
        """The model's numbers of the heads held here."""
        return list(range(self.rank * local, (self.rank + 1) * local))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The shares of all ranks side by side along `dim`. Differentiable, for a loss that is the same on all ranks.

        Every rank must call it.
        """
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(x.contiguous(), self.mesh, [Shard(dim % x.dim())], run_check=False).full_tensor()

    def own(self, x: Tensor, dim: int) -> Tensor:
        """The share of this rank in a whole tensor."""
        return x.tensor_split(self.size, dim)[self.rank]


def head_share(module: nn.Module) -> HeadShare | None:
    """How an attention module is shared among processes; None where its parameters are not spread over any."""
    for parameter in module.parameters():
        if is_sharded(parameter):
            mesh = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            names = mesh.mesh_dim_names or ()
            if mesh.ndim > 1:
                if "tp" not in names:
                    raise UnsupportedModel(
                        f"{type(module).__name__}: its parameters are spread over a mesh of axes {names}, none of "
                        "which is named tp; headwise follows tensor parallelism along one axis"
                    )
                mesh = mesh["tp"]
            return HeadShare(mesh)
    return None


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`. Costs nothing where torch.distributed is not built in."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is spread over processes (every rank must then call this)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def gathered(call: Call, share: HeadShare) -> Call:
    """The call over the heads of all ranks."""
    local, mask = call.q.shape[1], call.mask
    return replace(
        call,
        q=share.gather(call.q, 1),
        k=share.gather(call.k, 1),
        v=share.gather(call.v, 1),
        mask=share.gather(mask, 1) if mask is not None and mask.shape[1] == local > 1 else mask,
        sinks=None if call.sinks is None else share.gather(call.sinks, 0),
        heads=list(range(local * share.size)),
        memo={},
    )
