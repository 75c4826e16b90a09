"""The few directions of a head's queries, keys or values that a task uses.

    U_r = the first r right singular vectors of the centred vectors;  x -> mean + U_r U_r^T (x - mean)

Keys of one prompt's labels are centred on their own mean (what all labels share moves no attention between them),
queries on the mean over prompts. `Subspace.edit` is the projection as an edit (`attend.ProjectHead`); `label_pattern`
recomputes one head's attention among the labels from queries and keys alone.

Paper: headwise/papers/multiple_choice_circuit.py (Lieberum et al., 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edits import ProjectHead
from headwise.attend.groups import KeyGroup
from headwise.attend.read import Probe, Reading
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules, layout
from headwise.hf.inputs import as_inputs, frugal
from headwise.hf.projections import attention_shape
from headwise.hf.session import probe

__all__ = ["Subspace", "head_vectors", "label_pattern", "subspace"]

Part = Literal["q", "k", "v"]
Rotary = Literal["after", "before"]


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis `[d, r]` for one part of one head, and the mean `[d]` that a projection keeps.

    strength: `[min(n, d)]` all singular values of the centred vectors, largest first. rotary: whether the vectors were
    read after rotary embedding, as attention sees them, or before it.
    """

    head: Head
    part: Part
    basis: Float[Tensor, "d r"]
    mean: Float[Tensor, " d"]
    strength: Float[Tensor, " n"]
    rotary: Rotary = "after"

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def explained(self) -> float:
        """Share of the centred vectors' variance in the subspace."""
        square = self.strength.square()
        return float(square[: self.rank].sum() / square.sum().clamp_min(torch.finfo(square.dtype).tiny))

    def truncated(self, rank: int) -> "Subspace":
        """The first directions alone. Raises ValueError for more than there are."""
        if not 0 <= rank <= self.rank:
            raise ValueError(f"Subspace.truncated: rank is {rank}; expected 0 to {self.rank}")
        return Subspace(self.head, self.part, self.basis[:, :rank], self.mean, self.strength, self.rotary)

    def random(self, generator: torch.Generator | None = None) -> "Subspace":
        """Random directions, as many, around the same mean: the control of a projection."""
        drawn = torch.randn(self.basis.shape, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(drawn).Q.to(self.basis)
        return Subspace(self.head, self.part, basis, self.mean, self.strength, self.rotary)

    def project(self, vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """mean + U U^T (x - mean)."""
        return self.mean + ((vectors - self.mean) @ self.basis) @ self.basis.mT

    def edit(self, group: KeyGroup | None = None) -> ProjectHead:
        """The projection as an edit of a running model, at the positions of a group (None: everywhere).

        Raises ValueError for vectors from before rotary embedding: edits see those from after it.
        """
        if self.rotary == "before" and self.part != "v":
            raise ValueError(
                f"Subspace.edit: {self.head} {self.part} was read before rotary embedding but edits act after it; "
                "read it with rotary='after'"
            )
        return ProjectHead(self.part, self.basis, heads=[self.head], mean=self.mean, group=group)


class _Vectors(Probe):
    """Keeps q, k and v of one head."""

    def __init__(self, head: Head):
        super().__init__()
        self.head = head
        self.found: dict[str, Tensor] = {}

    def sparse(self, reading: Reading) -> None:
        call = reading.call
        if (call.tower, call.layer) == (self.head.tower, self.head.layer):
            key = self.head.head // call.groups
            self.found = {"q": call.q[:, self.head.head], "k": call.k[:, key], "v": call.v[:, key]}


def head_vectors(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], head: Head | str, *, rotary: Rotary = "after"
) -> dict[str, Float[Tensor, "b t d"]]:
    """Queries, keys and values of one head in one forward, by the names "q", "k" and "v"; open edits act.

    With grouped keys, k and v are those of the key head that the query head reads. rotary: "after" as attention sees
    them; "before" as the projections put them out (before norms of queries and keys as well, in families with them),
    only where queries, keys and values have projections of their own.

    Raises UnsupportedModel for "before" on a fused projection, ValueError for a head that is not there.
    """
    where = layout(model).check(Head.parse(head) if isinstance(head, str) else head)
    if rotary not in ("after", "before"):
        raise ValueError(f"head_vectors: rotary is {rotary!r}; choose after or before")
    given = {**frugal(model), **as_inputs(model, inputs)}
    if rotary == "before":
        return _before_rotary(model, given, where)
    reader = _Vectors(where)
    with torch.no_grad(), probe(model, reader):
        model(**given)
    return reader.found


def _before_rotary(model: nn.Module, given: dict[str, Any], head: Head) -> dict[str, Tensor]:
    module = next(m for m, place in attention_modules(model).items() if place == (head.tower, head.layer))
    shape = attention_shape(module)
    children = dict(module.named_children())
    if not {"q_proj", "k_proj", "v_proj"} <= set(children):
        raise UnsupportedModel(
            f"head_vectors: {type(module).__name__} has no q_proj, k_proj and v_proj of its own, only "
            f"{', '.join(children)}; read its vectors with rotary='after'"
        )
    found: dict[str, Tensor] = {}

    def keep(name: str, heads: int, at: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            found[name] = out.detach().unflatten(-1, (heads, -1))[:, :, at]

        return children[f"{name}_proj"].register_forward_hook(hook)

    key = head.head // (shape.heads // shape.kv_heads)
    hooks = [keep("q", shape.heads, head.head), keep("k", shape.kv_heads, key), keep("v", shape.kv_heads, key)]
    try:
        with torch.no_grad():
            model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def subspace(
    model: nn.Module,
    head: Head | str,
    part: Part,
    inputs: Tensor | Mapping[str, Any],
    places: Int[Tensor, "b n"],
    *,
    rank: int,
    by: Int[Tensor, "b n"] | None = None,
    rotary: Rotary = "after",
) -> Subspace:
    """The strongest directions in which a head's vectors differ at some places of a batch of prompts.

    part: "q", "k" or "v". places: columns to read in every prompt. With several (the labels), vectors are centred on
    their prompt's mean; with one (the last token), on the mean over prompts. by: a class of every place (such as the
    right option's index): vectors are first averaged within a class, so that c classes span at most c - 1 directions;
    None takes them one by one. rank: how many directions, 0 to d.

    Raises ValueError for places outside the prompts and a rank that the vectors cannot have.
    """
    where = layout(model).check(Head.parse(head) if isinstance(head, str) else head)
    if part not in ("q", "k", "v"):
        raise ValueError(f"subspace: part is {part!r}; choose q, k or v")
    vectors = head_vectors(model, inputs, where, rotary=rotary)[part]
    b, t, d = vectors.shape
    if places.ndim != 2 or len(places) != b or bool(((places < -t) | (places >= t)).any()):
        raise ValueError(
            f"subspace: places has shape {tuple(places.shape)} and runs from {int(places.min())} to "
            f"{int(places.max())}; expected columns of {b} prompts of {t} tokens"
        )
    if not 0 <= rank <= d:
        raise ValueError(f"subspace: rank is {rank}; the head's {part} has {d} dimensions, expected 0 to {d}")
    chosen = at_places(vectors, places).double()
    mean = chosen.mean((0, 1))
    centred = (chosen - (chosen.mean(1, keepdim=True) if places.shape[1] > 1 else mean)).flatten(0, 1)
    if by is not None:
        kinds = by.flatten()
        if len(kinds) != len(centred):
            raise ValueError(f"subspace: by has {len(kinds)} classes for {len(centred)} places; give one for each")
        centred = torch.stack([centred[kinds == kind].mean(0) for kind in kinds.unique()])
    # All d directions, so that a rank above the number of vectors still gives an orthonormal basis.
    _, strength, directions = torch.linalg.svd(centred, full_matrices=len(centred) < d)
    basis = directions[:rank].mT
    return Subspace(where, part, basis.to(vectors), mean.to(vectors), strength.to(vectors), rotary)


def at_places(vectors: Float[Tensor, "b t d"], places: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The vectors at some columns of every sequence; negative ones count from the end."""
    index = (places % vectors.shape[1]).to(vectors.device)
    return vectors.gather(1, index[..., None].expand(-1, -1, vectors.shape[2]))


def label_pattern(
    q: Float[Tensor, "b d"], k: Float[Tensor, "b n d"], *, scale: float | None = None
) -> Float[Tensor, "b n"]:
    """Attention of one query among some keys alone: softmax(scale q . k). scale: None is d ** -0.5.

    What a head would look at if only the labels could be seen. With queries of another prompt it tells what the
    index of an option says without its content.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * torch.einsum("bd,bnd->bn", q, k)).softmax(-1)
