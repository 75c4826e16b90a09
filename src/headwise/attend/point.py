"""Where headwise's own mechanisms hand over their heads, so that those are read and changed like a pretrained model's.

A mechanism passes its head outputs `[b t h e]` through a `HeadPoint` just before it mixes them. Nothing happens there
until edits or probes are attached to a model that holds points; `hf.session` finds them and numbers the layers by the
order of the model's modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Layout, Tower
from headwise.attend.call import Call
from headwise.attend.edit import OutputEdit
from headwise.attend.machine import BoundEdit, attend
from headwise.attend.read import Probe, Reading
from headwise.errors import UnsupportedModel

__all__ = ["HeadPoint", "PointVisit", "head_points", "point_layout"]


@dataclass
class PointVisit:
    """What is attached to a point: its layer, the edits of its model and the probes, in order."""

    layer: int
    edits: Sequence[BoundEdit] = ()
    probes: Sequence[Probe] = ()


class HeadPoint(nn.Module):
    """The identity on head outputs, until something is attached to it. It has no parameters and no state.

    num_heads, num_kv_heads: of the mechanism; num_kv_heads None is num_heads.
    """

    def __init__(self, num_heads: int, num_kv_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self.visit: PointVisit | None = None

    def extra_repr(self) -> str:
        return f"{self.num_heads}"

    def forward(
        self,
        out: Tensor,
        call: Callable[[], Call] | None = None,
        projection: nn.Linear | None = None,
        gates: Tensor | None = None,
    ) -> Tensor:
        """Head outputs `[b t h e]` to the same shape.

        call: makes the ordinary softmax attention call whose output `out` is, where there is one; without it the
        weights of these heads can be neither read nor changed, their outputs can. projection: what mixes the heads
        next, for probes of what a head writes. gates `[b t h]`: factors that the mechanism puts on its heads after
        attention; edits change what is gated, probes of outputs see the gated value. Raises UnsupportedModel for a
        probe or an edit that asks for what is not there.
        """
        visit = self.visit
        if visit is None:
            return _gated(out, gates)
        place = ("", visit.layer)
        edits = [bound for bound in visit.edits if bound.heads.get(place)]
        readers = [probe for probe in visit.probes if probe.reads_weights]
        if call is None:
            wanted = [type(bound.edit).__name__ for bound in edits if not isinstance(bound.edit, OutputEdit)]
            wanted += [type(probe).__name__ for probe in readers]
            if wanted:
                raise UnsupportedModel(
                    f"{wanted[0]}: layer {visit.layer} is a mechanism without one softmax over its keys, so its heads "
                    "have no rows of weights; edits and probes of head outputs work there (ScaleHeads, Ablate of mode "
                    "zero, mean or resample)"
                )
        if not edits and not visit.probes:
            return _gated(out, gates)
        made = _bare(out) if call is None else call()
        made.tower, made.layer = place
        out = _gated(attend(made, edits, readers, lambda: out), gates)
        outputs = [probe for probe in visit.probes if probe.reads_outputs]
        if outputs and projection is None:
            raise UnsupportedModel(f"{type(outputs[0]).__name__}: layer {visit.layer} does not mix heads by one matrix")
        if outputs and projection is not None:
            reading = Reading(made)
            with torch.no_grad():
                weight = projection.weight.view(-1, *out.shape[2:])
                reading.state["projection"] = weight.permute(1, 2, 0)
                mixed = projection(out.flatten(2))
                for probe in outputs:
                    probe.output(out, mixed, reading)
        return out


def head_points(model: nn.Module) -> list[HeadPoint]:
    """The points of a model, in the order of its modules: the n-th is layer n."""
    return [module for module in model.modules() if isinstance(module, HeadPoint)]


def point_layout(points: Sequence[HeadPoint]) -> Layout:
    """Heads of each layer."""
    return Layout((Tower("", tuple(p.num_heads for p in points), tuple(p.num_kv_heads for p in points)),))


def _gated(out: Tensor, gates: Tensor | None) -> Tensor:
    return out if gates is None else out * gates[..., None].to(out.dtype)


def _bare(out: Tensor) -> Call:
    """A call that has the shape of its heads and nothing to read."""
    b, t, h = out.shape[:3]
    rows = out.transpose(1, 2)
    return Call(q=rows, k=out.new_zeros(b, h, t, 1), v=rows, kind="bidirectional")
