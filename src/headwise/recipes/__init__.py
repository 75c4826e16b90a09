"""Training recipes for users' models and data, through transformers' Trainer."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
