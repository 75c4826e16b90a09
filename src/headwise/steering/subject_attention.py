"""IR-Diffusion: several subjects of a generated picture, each consistent with its own reference, without training.

The references and the target are denoised as one batch. In the target's self-attention each subject's queries also read
its own subject in its own reference (mutual self-attention), cut out and laid where the target has it (reposition), and
not the target's other subjects (isolation); in cross-attention they read the prompt of their reference (mutual
cross-attention). Works on networks of diffusers (extra: diffusion) through their attention processors, keyed on the
processor's name; everything is undone when the context ends.

Paper: headwise/papers/isolation_reposition_attention.py (He et al., 2024). Maths: headwise/attention/isolation.py.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from headwise.attention.isolation import Overlap, isolation_mask, subject_labels, subject_parts
from headwise.errors import UnsupportedModel
from headwise.steering._subject_maps import AttentionMaps
from headwise.steering._subject_processors import (
    CrossProcessor,
    JointProcessor,
    Plan,
    SelfProcessor,
    check_attention,
    is_joint,
)

__all__ = ["SubjectAttention"]

Masks = Bool[Tensor, "*g s h w"] | Float[Tensor, "*g s h w"] | Int[Tensor, "*g s h w"] | UInt8[Tensor, "*g s h w"]
FROM_LAYER = 36 / 70  # of SDXL's self-attention layers, counted as they run: from inside the decoder up


class SubjectAttention:
    """A context over a pipeline, its `unet` or its `transformer`; `attach()` and `remove()` do it without a block.

    pipe: a diffusers network whose self-attention is in transformer blocks (UNet2DConditionModel, DiT, PixArt) or joint
    with the text (Flux), or a pipeline that has one.
    subject_masks: `[s h w]` where each of s subjects lies in the target, in any resolution of the picture's form;
    `[g s h w]` for g targets at once. None takes them from the previous step's attention maps, for which `tokens` is
    needed; the first step then reads no references.
    reference_masks: the same of each subject in its reference. None means that there are no references: every picture
    of the batch is a target, and only isolation is left.
    The batch is, for each half of guidance (unconditional, conditional; or one half without guidance) and each target,
    its s references in order and then the target: `[uncond ref_1..s, uncond target, cond ref_1..s, cond target]`.

    isolate: subjects do not read each other, in all self-attention layers and steps. reposition: references are laid
    where the target has the subject; in networks without rotary positions this resamples the keys when sizes differ.
    start_layer: references are read from this self-attention layer on, counted as they run; None means 36/70 of them,
    as in the paper. layers: names of processors that read references, instead. start_step, steps: the first step that
    does, or the very steps; a step begins when the network is called with another timestep, and a run when it rises.
    mutual_cross_attention: share of the reference prompt inside a subject, 0 to 1; 0 leaves cross-attention alone.
    Joint attention has none. boost: added to reference logits (`ref_sa_lambda`). mask_dropout: share of a subject's
    queries, and without reposition of its reference's tokens, that is left out of the reading, drawn anew at every
    step from `seed`. overlap: see `isolation_mask`. threshold: masks are resized bilinearly to each layer's tokens and
    are set where they exceed it. tokens: places of each subject's words in the target's prompt; reference_tokens in
    its own reference's; both only where masks come from attention maps. mask_steps: masks that are given, of one
    target, serve so many steps, and attention maps the later ones (the authors' `sam_step`); None: all steps.

    Raises ValueError and TypeError for masks that are empty, not 0 and 1, overlap, or do not fit each other, and for
    options out of range; UnsupportedModel, on entry, for attention with keys of its own (IP-Adapter, added keys), fused
    projections or a processor that would be lost. While it is open, a batch of another size or masks of another form
    than the picture raise ValueError.

    Notes: the authors' processor counts calls; a network that is called twice a step, as by a ControlNet, puts that out
    of order, so that layers go by name here and steps by timestep. They zero the queries' masks by dropout also with
    reposition, as here. One mask serves both halves.

    >>> masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    >>> masks[0, :8], masks[1, 8:] = True, True
    >>> with SubjectAttention(pipe, masks, masks, mask_dropout=0.0):  # doctest: +SKIP
    ...     pipe(["a red fox", "a blue bird", "a red fox and a blue bird"])
    """

    def __init__(
        self,
        pipe: Any,
        subject_masks: Masks | None,
        reference_masks: Masks | None = None,
        *,
        isolate: bool = True,
        reposition: bool = True,
        start_layer: int | None = None,
        layers: Collection[str] | None = None,
        start_step: int = 0,
        steps: Collection[int] | None = None,
        mutual_cross_attention: float = 0.9,
        boost: float = 0.0,
        mask_dropout: float = 0.5,
        seed: int = 0,
        overlap: Overlap = "refuse",
        threshold: float = 0.5,
        tokens: list[list[int]] | None = None,
        reference_tokens: list[list[int]] | None = None,
        mask_steps: int | None = None,
    ) -> None:
        where = "SubjectAttention"
        if not 0 <= mutual_cross_attention <= 1:
            raise ValueError(f"{where}: mutual_cross_attention is {mutual_cross_attention}; expected 0 to 1")
        if not 0 <= mask_dropout < 1:
            raise ValueError(f"{where}: mask_dropout is {mask_dropout}; expected at least 0 and below 1")
        if not math.isfinite(boost):
            raise ValueError(f"{where}: boost is {boost}; expected a finite number")
        if not 0 <= threshold < 1:
            raise ValueError(f"{where}: threshold is {threshold}; expected at least 0 and below 1")
        self.network = _network(pipe)
        self.isolate, self.reposition, self.boost = isolate, reposition, float(boost)
        self.overlap: Overlap = overlap
        self.mix, self.dropout, self.seed, self.threshold = mutual_cross_attention, mask_dropout, seed, threshold
        self.start_layer, self.layers = start_layer, None if layers is None else frozenset(layers)
        self.start_step, self.steps = start_step, None if steps is None else frozenset(steps)
        if mask_steps is not None and (mask_steps < 1 or subject_masks is None):
            raise ValueError(
                f"{where}: mask_steps is {mask_steps}; expected at least 1, and subject_masks for these steps"
            )
        self.mask_steps = mask_steps
        self.maps: AttentionMaps | None = None
        self.subjects: Tensor | None = None
        self.reference: Tensor | None = None
        if subject_masks is None or mask_steps is not None:
            if not tokens or (reference_tokens is not None and len(reference_tokens) != len(tokens)):
                missing = "without subject_masks" if mask_steps is None else "with mask_steps"
                raise ValueError(f"{where}: {missing} give tokens, and as many reference_tokens")
            self.maps = AttentionMaps(tokens, reference_tokens)
        if subject_masks is not None:
            self.subjects = _binary(subject_masks, "subject_masks")
            subject_labels(self.subjects.flatten(2), overlap=overlap)
        if reference_masks is not None:
            self.reference = _binary(reference_masks, "reference_masks")
            if self.subjects is not None and self.reference.shape != self.subjects.shape:
                raise ValueError(
                    f"{where}: subject_masks has shape {tuple(self.subjects.shape)} and reference_masks "
                    f"{tuple(self.reference.shape)}; one reference for each subject, in one resolution"
                )
            if bool((empty := ~self.reference.flatten(2).any(-1)).any()):
                first = empty.nonzero()[0].tolist()
                raise ValueError(f"{where}: reference_masks is empty for subject {first[1]} of target {first[0]}")
        if self.subjects is not None and self.maps is not None:
            shape, named = tuple(self.subjects.shape[:2]), reference_tokens is not None
            if shape != (1, len(tokens or ())) or named != (self.reference is not None):
                raise ValueError(
                    f"{where}: mask_steps with masks of {shape[1]} subjects for {shape[0]} targets, tokens of "
                    f"{len(tokens or ())}, reference_masks {'not ' * (self.reference is None)}given and "
                    f"reference_tokens {'' if named else 'not '}given; expected the same subjects of one target in all"
                )
        self.references = self.reference is not None or reference_tokens is not None
        self.groups, self.count = (1, len(tokens or ())) if self.subjects is None else self.subjects.shape[:2]
        self.step = -1
        self.halves = 1
        self._time: float | None = None
        self._size: tuple[int, int] = (0, 0)
        self._patch = 0  # text tokens before the picture's, in joint attention
        self._plans: dict[tuple, Plan | None] = {}
        self._undo: list[tuple[Any, Any]] = []
        self._hook: Any = None
        self.reading: frozenset[str] = frozenset()

    def attach(self) -> "SubjectAttention":
        """Install the processors. Raises UnsupportedModel, and RuntimeError where they are installed already."""
        if self._hook is not None:
            raise RuntimeError("SubjectAttention: already open; leave it, or call remove(), before it is opened again")
        found = _attentions(self.network)
        for name, attention in found.items():
            check_attention(name, attention)
        own = [name for name in found if not name.endswith("attn2.processor")]
        if not own:
            raise UnsupportedModel(
                f"SubjectAttention: {type(self.network).__name__} has no self-attention in transformer blocks; give a "
                "UNet2DConditionModel, a DiT, a Flux transformer or a pipeline that has one"
            )
        self.reading = self._reading(own)
        self.step, self._time, self._plans = -1, None, {}
        self._hook = self.network.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name, attention in found.items():
            if not name.endswith("attn2.processor"):
                kind = JointProcessor if is_joint(attention) else SelfProcessor
            elif self.maps is None and not (self.references and self.mix):
                continue
            else:
                kind = CrossProcessor
            self._undo.append((attention, attention.processor))
            attention.set_processor(kind(self, name, attention.processor))
        return self

    def remove(self) -> None:
        """Give every layer its own processor back. Removing twice does nothing."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        while self._undo:
            attention, processor = self._undo.pop()
            attention.set_processor(processor)
        self._plans = {}

    def __enter__(self) -> "SubjectAttention":
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _reading(self, names: list[str]) -> frozenset[str]:
        if not self.references:
            return frozenset()
        if self.layers is not None:
            if unknown := sorted(self.layers - set(names)):
                raise ValueError(f"SubjectAttention: layers names {unknown[0]!r}; the self-attention is {names}")
            return self.layers
        first = int(len(names) * FROM_LAYER) if self.start_layer is None else self.start_layer
        if not 0 <= first < len(names):
            raise ValueError(f"SubjectAttention: start_layer is {first}; the network has layers 0 to {len(names) - 1}")
        return frozenset(names[first:])

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """What a call of the network says: its step, the form of its pictures and the halves of its batch."""
        sample, timestep, size, text = _call(module, args, kwargs)
        time = float(torch.as_tensor(timestep).flatten()[0])
        if self._time is None or time > self._time:
            self.step, self._plans = 0, {}
            if self.maps is not None:
                self.maps.forget()
        elif time != self._time:
            self.step += 1
            self._plans = {key: plan for key, plan in self._plans.items() if not self._changing}
            if self.maps is not None:
                self.maps.turn()
        self._time = time
        group = self.groups * (self.count + 1 if self.references else 1)
        if sample not in (group, 2 * group):
            each = f"{self.count} references and the target" if self.references else "the target"
            raise ValueError(
                f"SubjectAttention: the batch is {sample}; expected {group}, or {2 * group} with guidance: {each} for "
                f"each of {self.groups} masked pictures"
            )
        known = self.subjects if self.subjects is not None else self.reference
        if known is not None and known.shape[-2] * size[1] != known.shape[-1] * size[0]:
            raise ValueError(
                f"SubjectAttention: masks of {known.shape[-2]} x {known.shape[-1]} do not fit a picture of {size[0]} x "
                f"{size[1]}; expected the same form"
            )
        if (size, text, sample // group) != (self._size, self._patch, self.halves):
            self._plans = {}
        self._size, self._patch, self.halves = size, text, sample // group

    @property
    def _changing(self) -> bool:
        """Whether plans differ from step to step."""
        return bool(self.dropout) or self.maps is not None

    def reads(self, name: str) -> bool:
        """Whether this layer reads references in this step."""
        on = self.step >= self.start_step if self.steps is None else self.step in self.steps
        return on and name in self.reading

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of a layer's tokens. ValueError where they are no grid of this picture's form."""
        down = 1
        while down <= max(self._size):
            rows, columns = (math.ceil(length / down) for length in self._size)
            if rows * columns == tokens:
                return rows, columns
            down *= 2
        raise ValueError(
            f"SubjectAttention: a layer has {tokens} tokens, which is no power-of-two reduction of the picture's "
            f"{self._size[0]} x {self._size[1]}"
        )

    def plan(self, name: str, tokens: int) -> Plan | None:
        """What a self-attention layer does with so many tokens; None where it does what it always did."""
        reading = self.reads(name)
        if (tokens, reading) not in self._plans:
            self._plans[tokens, reading] = self._make(tokens - self._patch, reading)
        return self._plans[tokens, reading]

    def target_masks(self, tokens: int) -> Tensor | None:
        """`[groups, s, tokens]` masks in the target at a layer's resolution; None while there are none."""
        if self.subjects is not None and self._given:
            return self._resized(self.subjects, self.grid(tokens))
        return None if self.maps is None else self.maps.target(self.grid(tokens))

    @property
    def _given(self) -> bool:
        """Whether masks that were given serve this step."""
        return self.mask_steps is None or self.step < self.mask_steps

    def _make(self, tokens: int, reading: bool) -> Plan | None:
        size = self.grid(tokens)
        target = self.target_masks(tokens)
        if target is None or not bool(target.any()):
            return None
        isolating = self.isolate and self.count > 1
        own = None
        if isolating:
            seen = isolation_mask(target, overlap=self.overlap)
            own = None if bool(seen.all()) else F.pad(seen, (self._patch, 0, self._patch, 0), value=True)
        parts = []
        if reading:
            known = self.reference if self._given else None
            reference = self._mapped(size) if known is None else self._resized(known, size)
            if reference is not None:
                asking = self._dropped(target, size)
                keys = reference if self.reposition else self._dropped(reference, size)
                form = size if self.reposition else None
                lay = self.place(target, size)
                parts = subject_parts(target, keys, form, queries=asking, lay=lay, offset=self._patch)
        if own is None and not parts:
            return None
        return Plan(own, parts).repeated(self.halves)

    def place(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        """Where references are laid, `[g s n]`: on their subjects."""
        return target

    def _mapped(self, size: tuple[int, int]) -> Tensor | None:
        return None if self.maps is None else self.maps.references(size)

    def _resized(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks at a layer's resolution, `[g s tokens]`."""
        made = F.interpolate(masks.float(), size, mode="bilinear", align_corners=False)
        device = next(self.network.parameters()).device
        return (made > self.threshold).flatten(2).to(device)

    def _dropped(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks with a share of their tokens left out, the same in every layer of a step; none is emptied."""
        if not self.dropout:
            return masks
        number = (self.seed * 1_000_003 + self.step) * 4099 + size[0] * size[1]
        draw = torch.rand(masks.shape, generator=torch.Generator().manual_seed(number % 2**63)).to(masks.device)
        kept = masks & (draw >= self.dropout)
        return torch.where(kept.any(-1, keepdim=True), kept, masks)


def _network(pipe: Any) -> nn.Module:
    for network in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None), pipe):
        if isinstance(network, nn.Module):
            break
    else:
        raise UnsupportedModel(
            f"SubjectAttention: {type(pipe).__name__} has no unet and no transformer; give a pipeline that has, or it"
        )
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UnsupportedModel(
            'SubjectAttention: diffusers is not installed; pip install "headwise[diffusion]"'
        ) from None
    return network


def _attentions(network: nn.Module) -> dict[str, Any]:
    """Attention modules of transformer blocks by their processor's name, in the order in which they run."""
    found = {
        f"{name}.processor": module
        for name, module in network.named_modules()
        if hasattr(module, "set_processor") and hasattr(module, "processor")
    }
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}  # modules list the decoder before the middle
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split(".")[0], 0)))


def _call(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, Any, tuple[int, int], int]:
    """Batch, timestep, rows and columns of the picture and tokens of text of a call of the network."""
    if "img_ids" in kwargs:
        states = args[0] if args else kwargs["hidden_states"]
        ids = kwargs["img_ids"].reshape(-1, kwargs["img_ids"].shape[-1])[: states.shape[1]]
        size = tuple(int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (-2, -1))
        return states.shape[0], kwargs["timestep"], (size[0], size[1]), kwargs["txt_ids"].shape[-2]
    states = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    if states.ndim != 4:
        raise ValueError(
            f"SubjectAttention: {type(module).__name__} was called with states of shape {tuple(states.shape)}; "
            "expected pictures [b, c, h, w], or tokens together with img_ids given by name"
        )
    patch: Any = getattr(getattr(module, "config", None), "patch_size", None) or 1
    return states.shape[0], timestep, (states.shape[2] // patch, states.shape[3] // patch), 0


def _binary(masks: Any, name: str) -> Tensor:
    """`[g s h w]` booleans; what is not 0 and 1 is refused."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"SubjectAttention: {name} is {type(masks).__name__}; expected a tensor [s, h, w]")
    if masks.ndim not in (3, 4) or 0 in masks.shape:
        raise ValueError(
            f"SubjectAttention: {name} has shape {tuple(masks.shape)}; expected [s, h, w] or [g, s, h, w], s at least 1"
        )
    if masks.dtype != torch.bool and not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError(f"SubjectAttention: {name} holds values besides 0 and 1; expected a mask, such as x > 0.5")
    masks = masks.bool()
    return masks if masks.ndim == 4 else masks[None]
