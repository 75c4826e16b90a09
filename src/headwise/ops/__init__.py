"""Tensor primitives, each written once: masks, stable softmax, windows, clustering."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
