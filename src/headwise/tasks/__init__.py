"""Data and metrics: one file per generator, benchmark or format."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
