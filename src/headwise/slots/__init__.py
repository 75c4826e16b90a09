"""Slots that compete for features."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
