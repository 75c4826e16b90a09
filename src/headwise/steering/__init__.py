"""Changing how a trained model attends, without training: one file per method."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
