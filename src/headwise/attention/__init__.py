"""Mechanisms: ways for tokens to attend, as a function and a module, one file each."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
