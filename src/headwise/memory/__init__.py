"""State that outlives a step: sequence memories, episodic memories, KV caches."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
