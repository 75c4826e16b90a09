"""VHR: amplify the heads that depend on the picture while a model writes, so that it outweighs the language prior.

    A'_{l,i} = alpha A_{l,i}   for the upper half of each layer's heads by how far the picture moves them

The heads are found for every sequence at the last token of its prompt and kept while it is continued. Layer l's are
found when the layers before it are reinforced already, with the picture and without it: the run without it goes
along, layer by layer, inside the one forward that reads the prompt.

Paper: headwise/papers/vision_aware_head_reinforcement.py (He et al., ACL 2025).
"""

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.call import Call
from headwise.attend.edit import Edit, Heads
from headwise.attend.edits import ScaleHeads
from headwise.attend.groups import KeyGroup, first_token, image_tokens
from headwise.attend.step import Step
from headwise.errors import UnsupportedModel
from headwise.heads.vision import aware_heads
from headwise.hf.addresses import layout
from headwise.hf.images import image_token
from headwise.hf.layerwise import Layerwise, position_arguments

__all__ = ["VisionAwareHeadReinforcement", "reinforced_layers"]

Layers = str | int | Sequence[int | slice] | None
LAST = 14 / 32  # of all layers: the paper's last 14 of LLaVA-1.5's 32


@dataclass
class VisionAwareHeadReinforcement(Edit):
    """Multiply the outputs of the heads that depend on the picture by alpha, in prompt and continuation alike.

    alpha: above 0; at 1 nothing changes. layers: which layers ("1,-14:", or numbers and slices); None is the second and
        the last 14 of 32, or that share of them: on a model of four, 1 to 3. heads: only these of what is chosen.
    drop_outliers: leave out heads that surge when the picture is removed (see `heads.aware_heads`).
    group: what is taken away instead of the image tokens, such as the `spans` of a document.

    The choice is made for every sequence by itself. A sequence that has nothing of the group stays as it is. Where the
    prompt comes in parts, it is made at the end of the first part that has some, and kept. `chosen` holds the last
    choice, `[b, l, h]`.

    Raises ValueError for alpha of 0 or less, layers that the model has not, and a prompt that ends inside the picture;
    UnsupportedModel for a model without image tokens where no group was given. Warns where layers reach beyond the
    model's.
    """

    alpha: float = 2.0
    layers: Layers = None
    drop_outliers: bool = True
    group: KeyGroup | None = None

    settles = True

    @staticmethod
    def example() -> "VisionAwareHeadReinforcement":
        """One for models without pictures: what goes with the first token, in two heads."""
        return VisionAwareHeadReinforcement(0.4, "all", False, first_token(), heads=["0.1", "1.2"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._record: dict[str, Tensor] = {}
        if self.layers is not None and not isinstance(self.layers, str):
            items: Any = [self.layers] if isinstance(self.layers, int) else self.layers
            self.layers = ",".join(_written(item) if isinstance(item, slice) else str(int(item)) for item in items)
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise ValueError(f"VisionAwareHeadReinforcement: alpha is {self.alpha}; it must be above 0 and finite")
        if self.group is not None and self.group.uses_generated:
            raise ValueError(
                f"VisionAwareHeadReinforcement: group {self.group.name!r} may hold generated tokens; give a part "
                "of the prompt"
            )

    @property
    def neutral(self) -> bool:
        return self.alpha == 1

    @property
    def chosen(self) -> Tensor | None:
        """`[b, l, h]` the heads of the last prompt that was read; None before the first."""
        return self._record.get("chosen")

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return (image_tokens() if self.group is None else self.group,)

    def attached(self, model: nn.Module, select: Callable[[Heads], list[Head]]) -> tuple[Edit, ...]:
        if self.neutral:
            return ()
        main = layout(model).main
        if self.group is None:
            image_token(model)  # refused by name where there is none
        wanted = reinforced_layers(self.layers, main.layers)
        allowed = torch.zeros(main.layers, max(main.heads), dtype=torch.bool)
        for head in select(self.heads):
            if head.tower != main.name:
                raise ValueError(f"VisionAwareHeadReinforcement: head {head} is not in the tower that reads the prompt")
            allowed[head.layer, head.head] = head.layer in wanted
        every = [head for head in layout(model).heads() if bool(allowed[head.layer].any())]
        if not every:
            return ()
        return (_Reinforce(edit=self, model=model, allowed=allowed, heads=every, when=self.when),)


def reinforced_layers(layers: Layers, count: int) -> list[int]:
    """The numbers of the layers that `layers` names in a model of `count`.

    layers: None (the second, and the last 14/32 of all, rounded), "all", numbers and slices, or such as text:
    "1,-14:" is the second and the last fourteen. Warns where a slice reaches beyond the first layer and is cut; raises
    ValueError for a number beyond the layers, for no layer and for what cannot be read.

    >>> reinforced_layers(None, 32) == [1, *range(18, 32)]
    True
    >>> reinforced_layers("1,-2:", 8)
    [1, 6, 7]
    """
    if layers is None:
        layers = (1, slice(count - max(1, round(LAST * count)), None)) if count > 1 else (0,)
    if isinstance(layers, str):
        layers = [slice(None)] if layers.strip() == "all" else [_item(part, layers) for part in layers.split(",")]
    found: set[int] = set()
    for item in [layers] if isinstance(layers, int) else layers:
        if isinstance(item, slice):
            if any(end is not None and abs(end) > count for end in (item.start, item.stop)):
                warnings.warn(
                    f"layers: {_written(item)} reaches beyond the {count} layers of this model and is cut to them; "
                    "give layers=None for the paper's share",
                    stacklevel=2,
                )
            found.update(range(count)[item])
        elif -count <= item < count:
            found.add(int(item) % count)
        else:
            raise ValueError(f"layers: {item} is out of range; the model has layers 0 to {count - 1}")
    if not found:
        raise ValueError(f"layers: {layers!r} names none of the {count} layers")
    return sorted(found)


def _item(part: str, whole: str) -> int | slice:
    try:
        ends = [int(end) if end.strip() else None for end in part.split(":")]
    except ValueError:
        ends = []
    if len(ends) == 1 and ends[0] is not None:
        return ends[0]
    if len(ends) == 2:
        return slice(*ends)
    raise ValueError(f"layers: {whole!r} cannot be read; write numbers and slices, as in 1,-14:")


def _written(item: slice) -> str:
    return ":".join("" if end is None else str(end) for end in (item.start, item.stop))


@dataclass
class _State:
    """What is known of the sequences that one thread is working on. scale: `[b, l, h]`."""

    step: Step | None = None
    scale: Tensor | None = None
    settled: bool = False  # a choice was made
    beside: Layerwise | None = None  # the run without the group, while a choice is being made
    rows: Tensor | None = None  # the last real row of each sequence in this forward
    some: Tensor | None = None  # sequences that have something of the group


@dataclass
class _Reinforce(ScaleHeads):
    """`ScaleHeads` whose scales, one for each sequence, layer and head, are found while the prompt is read."""

    edit: VisionAwareHeadReinforcement = field(kw_only=True)
    model: nn.Module = field(kw_only=True)
    allowed: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._thread = threading.local()
        self._layers = [layer for layer, named in enumerate(self.allowed.tolist()) if any(named)]

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return self.edit.key_groups()

    def rows(self, call: Call) -> bool:
        return True  # a prompt that is not changed is still looked at; `change` keeps to `when`

    def change(self, out: Tensor, call: Call) -> Tensor:
        state = self._state(call)
        if state.beside is not None:
            self._choose(state, out, call)
        touched = Edit.rows(self, call)
        if state.scale is None or touched is False:
            return out
        part = state.scale[:, call.layer, call.heads].to(out)
        if out.shape[0] % len(part):
            raise ValueError(
                f"VisionAwareHeadReinforcement: heads were chosen for {len(part)} sequences, this forward has "
                f"{out.shape[0]}; read the prompts again"
            )
        if out.shape[0] > len(part):  # beams of each sequence, which share its heads
            part = part.repeat_interleave(out.shape[0] // len(part), 0)
        new = out * part[:, None, :, None]
        return new if touched is True else torch.where(touched[..., None, None], new, out)

    def _state(self, call: Call) -> _State:
        """The state of this forward: a new one for a new prompt, the one before for what continues it."""
        state: _State = getattr(self._thread, "state", None) or _State()
        if state.step is call.step or call.layer != self._layers[0]:
            return state
        if call.step.past == 0:
            state = _State()
        elif state.step is None:
            raise ValueError(
                "VisionAwareHeadReinforcement: the prompt was read before this edit was there, so its heads are not "
                "known; open it before the prompt is read"
            )
        state.step, state.beside = call.step, None
        if not state.settled and not call.step.generating:
            self._begin(state, call)
        self._thread.state = state
        return state

    def _begin(self, state: _State, call: Call) -> None:
        """Start the run without the group, where any sequence has some of it."""
        step = call.step
        (group,) = self.key_groups()
        members = group.members(step)
        state.some = (members & step.real).any(1)
        if not bool(state.some.any()):
            return
        if len(call.heads) != layout(self.model).main.heads[call.layer]:
            raise UnsupportedModel(
                "VisionAwareHeadReinforcement: this process holds some of the heads of a layer, but the choice "
                "compares all of them; run the model in one process"
            )
        if bool((step.ids < 0).any()):
            raise ValueError(
                "VisionAwareHeadReinforcement: the prompt came as embeddings, so the run without the picture cannot be "
                "made; give input_ids"
            )
        index = torch.arange(step.total, device=step.ids.device)
        last = torch.where(step.real, index, -1).amax(1)
        sequences = torch.arange(len(last), device=last.device)
        if bool(members[sequences, last].any()):
            raise ValueError(
                "VisionAwareHeadReinforcement: a prompt ends inside what is taken away (the picture); the heads are "
                "chosen at a token that follows it"
            )
        kept = step.real & ~members
        width = int(kept.sum(1).max())
        # Sequences that have nothing of the group may be whole; they only go along.
        order = kept.int().argsort(dim=1, stable=True)[:, step.total - width :]
        mask = kept.gather(1, order)
        ids = step.ids.gather(1, order).masked_fill(~mask, int(step.ids[0, last[0]]))
        if not bool(mask[:, -1].all()):
            raise ValueError("VisionAwareHeadReinforcement: nothing of a prompt is left without the group")
        given = {"input_ids": ids, "attention_mask": mask.long()}
        state.beside = Layerwise(self.model, {**given, **position_arguments(self.model, given["attention_mask"])})
        state.rows = last - step.past
        state.scale = torch.ones(len(ids), *self.allowed.shape, device=step.ids.device)
        state.settled = True
        self.edit._record["chosen"] = torch.zeros(len(ids), *self.allowed.shape, dtype=torch.bool)

    def _choose(self, state: _State, out: Tensor, call: Call) -> None:
        """Choose this layer's heads and reinforce them in the run beside; the run at hand follows in `change`."""
        beside, layer = state.beside, call.layer
        assert beside is not None and state.scale is not None and state.some is not None and state.rows is not None
        there = out[torch.arange(len(out), device=out.device), state.rows.to(out.device)].detach().float()
        some = state.some

        def reinforce(other: Tensor) -> Tensor:
            gone = other[:, -1].float()
            moved = (there.to(gone) - gone).norm(dim=-1) * some[:, None].to(gone)
            picked = aware_heads(moved, gone.square().sum(-1), drop_outliers=self.edit.drop_outliers)
            picked &= self.allowed[layer, : picked.shape[1]].to(picked.device)
            self.edit._record["chosen"][:, layer, : picked.shape[1]] = picked.cpu()
            factor = torch.where(picked, float(self.edit.alpha), 1.0)
            state.scale[:, layer, : picked.shape[1]] = factor.to(state.scale)  # pyright: ignore[reportOptionalSubscript]
            if self.when == "generated":
                return other
            return other * factor[:, None, :, None].to(other)

        beside.advance(layer, reinforce)
        if layer == self._layers[-1]:
            state.beside = None

    @property
    def neutral(self) -> bool:
        return False
