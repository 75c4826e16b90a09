"""What one forward pass is about: the facts that key groups need and that an attention call never receives."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Step"]


@dataclass
class Step:
    """One forward of a stack of layers, with everything known of its sequence so far.

    ids: `[b, total]` token ids of all positions seen so far, -1 where the id was never seen (embeddings were given,
        or the cache was filled elsewhere).
    real: `[b, total]` boolean, False on padding.
    prompt: `[b, total]` boolean, True where the token came in with a prompt, False where it was generated.
    past: tokens in the cache before this forward. length: tokens in this forward; `total = past + length`.
    images: `[b, total]` boolean or None where the model has no image token.
    cache: anything that must be computed once per forward and not once per layer.
    carried: what edits found out about this sequence, handed on from forward to forward; it lies with the cache.
    """

    ids: Tensor
    real: Tensor
    prompt: Tensor
    past: int
    length: int
    images: Tensor | None = None
    wants_weights: bool = False
    cache: dict = field(default_factory=dict)
    carried: dict = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.past + self.length

    @property
    def generating(self) -> bool:
        """True for a decode step: one new token on a filled cache."""
        return self.past > 0 and self.length == 1

    @property
    def first(self) -> Tensor:
        """`[b]` index of the first real token of each sequence (0 where there is none)."""
        return self.real.int().argmax(-1)

    @property
    def batch(self) -> int:
        return self.real.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def all_real(self) -> bool:
        """Whether it is known, without a look at values, that there is no padding."""
        return False

    @property
    def rows_real(self) -> bool:
        """Whether all tokens of this forward are real. Looks at values, once a forward, where padding may be."""
        return self.once("rows real", lambda: bool(self.real[:, self.past :].all()))

    @classmethod
    def of(cls, batch: int, length: int, device: torch.device | str = "cpu", past: int = 0) -> "Step":
        """The step of tokens about which nothing is known but their number."""
        shape = (batch, past + length)
        return cls(
            ids=torch.full(shape, -1, device=device),
            real=torch.ones(shape, dtype=torch.bool, device=device),
            prompt=torch.ones(shape, dtype=torch.bool, device=device),
            past=past,
            length=length,
        )

    def to(self, device: torch.device | str) -> "Step":
        """The same step on another device, made once per forward: layers of one model may lie on several."""
        if self.device == torch.device(device):
            return self
        return self.once(("on", str(device)), lambda: self._moved(device))

    def _moved(self, device: torch.device | str) -> "Step":
        tensors: dict[str, Any] = {name: getattr(self, name).to(device) for name in ("ids", "real", "prompt")}
        kept = {name: getattr(self, name) for name in ("past", "length", "wants_weights", "carried")}
        return Step(**tensors, **kept, images=None if self.images is None else self.images.to(device))

    def once(self, key: object, make):
        """Return `make()`, computed at the first call with this key in this forward."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]
