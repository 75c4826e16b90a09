"""The attention processors of `SubjectAttention`: self-attention, cross-attention, and joint attention with text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attend.kernels import attention_with_lse
from headwise.attention.isolation import SubjectPart, at_places, read_references
from headwise.attention.softmax import split_heads
from headwise.errors import UnsupportedModel

if TYPE_CHECKING:
    from headwise.steering._subject_maps import AttentionMaps

# Processors that compute plain attention, which is what ours compute beside what they add.
PLAIN = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", "FluxAttnProcessor"}


@runtime_checkable
class Owner(Protocol):
    """What a processor asks of the context that installed it."""

    halves: int
    groups: int
    count: int
    references: bool
    boost: float
    mix: float
    maps: "AttentionMaps | None"

    def plan(self, name: str, tokens: int) -> "Plan | None": ...

    def target_masks(self, tokens: int) -> Tensor | None: ...


@dataclass(frozen=True)
class Plan:
    """What the target's self-attention does: which of its own keys a row sees, and what it reads of references."""

    own: Bool[Tensor, "b t t"] | None
    parts: list[SubjectPart]

    def repeated(self, halves: int) -> "Plan":
        """The same for both halves of guidance."""
        if halves == 1:
            return self

        def twice(x: Any) -> Any:
            return x.repeat(halves, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) else x

        parts = [SubjectPart(**{name: twice(value) for name, value in vars(part).items()}) for part in self.parts]
        return Plan(twice(self.own), parts)


def check_attention(name: str, attention: Any) -> None:
    """Refuse by name what these processors would lose."""
    processor = type(attention.processor).__name__
    advice = "take it out first (unload_ip_adapter, unfuse_qkv_projections), or use another network"
    if "IPAdapter" in processor:
        raise UnsupportedModel(f"SubjectAttention: {name} is {processor}, an IP-Adapter with keys of its own; {advice}")
    if processor not in PLAIN:
        raise UnsupportedModel(
            f"SubjectAttention: {name} is {processor}, which would be lost; expected one of "
            f"{', '.join(sorted(PLAIN))}: {advice}"
        )
    if not is_joint(attention) and getattr(attention, "add_k_proj", None) is not None:
        raise UnsupportedModel(f"SubjectAttention: {name} has added keys (add_k_proj); {advice}")
    if getattr(attention, "fused_projections", False):
        raise UnsupportedModel(f"SubjectAttention: {name} has fused projections; {advice}")


def is_joint(attention: Any) -> bool:
    """Whether text and picture are one sequence, as in Flux."""
    return type(attention).__name__ == "FluxAttention"


class _Processor:
    def __init__(self, owner: Owner, name: str, original: Any) -> None:
        self.owner, self.name, self.original = owner, name, original

    def grouped(self, x: Tensor) -> Tensor:
        """`[batch ...]` as `[halves * groups, references + 1, ...]`; the target comes last."""
        owner = self.owner
        return x.unflatten(0, (owner.halves * owner.groups, owner.count + 1 if owner.references else 1))


class SelfProcessor(_Processor):
    """Self-attention of a transformer block: references as ever, the target by its plan."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b t c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b t c"]:
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.ndim != 3:
            raise UnsupportedModel(f"SubjectAttention: {self.name} has a context, a mask or a grid; only tokens work")
        plan = self.owner.plan(self.name, hidden_states.shape[1])
        if self.owner.maps is not None:
            self.owner.maps.note_self(self.name, attn, hidden_states, self.grouped)
        if plan is None:
            return self.original(attn, hidden_states, None, None, temb)
        states = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if attn.group_norm is not None:
            states = attn.group_norm(states.mT).mT
        q, k, v = (split_heads(part(states), attn.heads) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (x if norm is None else norm(x) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        q, k, v = (self.grouped(x) for x in (q, k, v))

        def key_values(part: SubjectPart) -> tuple[Tensor, Tensor]:
            return at_places(k[:, part.subject], part.keys), at_places(v[:, part.subject], part.keys)

        target = attend_target(q[:, -1], k[:, -1], v[:, -1], plan, key_values, self.owner.boost)
        out = with_references(q, k, v, target).transpose(1, 2).flatten(2)
        return finished(attn, out.to(hidden_states.dtype), hidden_states)


def attend_target(q: Tensor, k: Tensor, v: Tensor, plan: Plan, key_values: Any, boost: float) -> Tensor:
    mask = None if plan.own is None else plan.own[:, None]
    if not plan.parts:
        return F.scaled_dot_product_attention(q, k, v, mask)
    out, lse = attention_with_lse(q, k, v, mask=mask)
    return read_references(q, out, lse, plan.parts, key_values, boost=boost)


def with_references(q: Tensor, k: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """`[batch h t d]`: the references' own attention before each target's."""
    if q.shape[1] == 1:
        return target
    first, second, third = (x[:, :-1].flatten(0, 1) for x in (q, k, v))
    plain = F.scaled_dot_product_attention(first, second, third)
    return torch.cat([plain.unflatten(0, (q.shape[0], -1)), target[:, None]], 1).flatten(0, 1)


def finished(attn: Any, out: Tensor, residual: Tensor) -> Tensor:
    """The projection that mixes heads, and what diffusers' attention does after it."""
    out = attn.to_out[1](attn.to_out[0](out))
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


class CrossProcessor(_Processor):
    """Cross-attention: inside a subject the target also reads the prompt of that subject's reference."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b t c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b t c"]:
        own = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        owner = self.owner
        if encoder_hidden_states is None:
            return own
        if owner.maps is not None:
            owner.maps.note_cross(self.name, attn, hidden_states, encoder_hidden_states, self.grouped)
        masks = owner.target_masks(hidden_states.shape[1]) if owner.mix and owner.references else None
        if masks is None:
            return own
        states = self.grouped(hidden_states)[:, -1]
        text = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
        text = self.grouped(text)[:, :-1].flatten(0, 1)
        q = split_heads(attn.to_q(states if attn.group_norm is None else attn.group_norm(states.mT).mT), attn.heads)
        k, v = (split_heads(part(text), attn.heads) for part in (attn.to_k, attn.to_v))
        q, k = (x if norm is None else norm(x) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        k, v = (x.unflatten(0, (q.shape[0], owner.count)) for x in (k, v))
        shown = self._shown(attn, attention_mask, text.shape[1], hidden_states.shape[0])
        total = torch.zeros_like(q)
        inside = masks.repeat(owner.halves, 1, 1)
        for i in range(owner.count):
            mask = None if shown is None else shown[:, i]
            read = F.scaled_dot_product_attention(q, k[:, i], v[:, i], mask)
            total = total + read * inside[:, i, None, :, None]
        number = inside.sum(1)
        mean = (total / number.clamp_min(1)[:, None, :, None]).transpose(1, 2).flatten(2)
        mutual = finished(attn, mean.to(states.dtype), states)
        target = self.grouped(own)
        mixed = torch.where(
            (number > 0)[..., None], (1 - owner.mix) * target[:, -1] + owner.mix * mutual, target[:, -1]
        )
        return torch.cat([target[:, :-1], mixed[:, None]], 1).flatten(0, 1)

    def _shown(self, attn: Any, attention_mask: Tensor | None, tokens: int, batch: int) -> Tensor | None:
        """The prompt's mask for each reference, `[halves * groups, s, heads, 1, tokens]`, as diffusers forms it."""
        if attention_mask is None:
            return None
        made = attn.prepare_attention_mask(attention_mask, tokens, batch).view(batch, attn.heads, -1, tokens)
        return self.grouped(made)[:, :-1]


class JointProcessor(_Processor):
    """Flux: text and picture in one attention. References' keys get the rotary phase of where they come to lie."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b t c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise UnsupportedModel(f"SubjectAttention: {self.name} was given a mask; leave it out")
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        plan = self.owner.plan(self.name, hidden_states.shape[1] + text)
        if plan is None:
            return self.original(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
        heads = attn.heads
        q, k, v = (split_heads(part(hidden_states), heads) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            first = [split_heads(part(encoder_hidden_states), heads) for part in added]
            first[0], first[1] = attn.norm_added_q(first[0]), attn.norm_added_k(first[1])
            q, k, v = (torch.cat(pair, 2) for pair in zip(first, (q, k, v), strict=True))
        bare, v = self.grouped(k), self.grouped(v)
        q, k = (self.grouped(_turned(x, image_rotary_emb)) for x in (q, k))

        def key_values(part: SubjectPart) -> tuple[Tensor, Tensor]:
            keys = at_places(bare[:, part.subject], part.keys)
            return _turned(keys, image_rotary_emb, part.places), at_places(v[:, part.subject], part.keys)

        target = attend_target(q[:, -1], k[:, -1], v[:, -1], plan, key_values, self.owner.boost)
        out = with_references(q, k, v, target).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return out
        words, picture = out[:, :text], out[:, text:]
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(words)


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor] | None, places: Tensor | None = None) -> Tensor:
    """Rotary positions on pairs of neighbouring channels of x `[b h t d]`; of other places where given, `[b t]`."""
    if rotary is None:
        return x
    cosine, sine = (angle.to(x.device) if places is None else angle.to(x.device)[places][:, None] for angle in rotary)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-odd, even], -1).flatten(-2)
    return (x.float() * cosine + across * sine).to(x.dtype)
