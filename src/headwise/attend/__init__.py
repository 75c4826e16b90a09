"""One attention call with probes and edits: heads, key groups, head maps. Torch only."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
