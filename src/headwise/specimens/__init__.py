"""The small trained models that ship with headwise, and how each was made."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
