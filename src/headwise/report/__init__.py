"""Tables, plots and the self-contained HTML report."""

from headwise._lazy import area

__getattr__, __dir__ = area(__name__, __path__)
