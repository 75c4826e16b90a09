"""The only code that knows transformers' insides: dispatch, head addresses, sites, token spans."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
