"""The catalogue: one file per paper, with its record, its claims and its run."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
