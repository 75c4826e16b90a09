"""Probes that bring their own prompts, in the vocabulary of the model that they read.

To add one, write a module of `headwise.heads` with a subclass; a scan finds it by its name.
"""

import importlib
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from headwise._lazy import module_names
from headwise.attend.head_map import HeadMap

__all__ = ["PromptProbe", "prompt_probes"]


class PromptProbe:
    """Scores heads on generated prompts.

    name, sentence: what a person asks for and what a high score means. unit: what the scores are. by_default: whether
    a scan runs it unasked (only if it is quick).
    """

    name: ClassVar[str] = ""
    sentence: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    kind: ClassVar[str] = "prompt"
    by_default: ClassVar[bool] = False

    def measure(self, model: nn.Module, tokenizer: Any = None, *, seed: int = 0) -> HeadMap:
        """A head map with this probe alone.

        Raises UnsupportedModel for a model that the probe makes no sense for; a scan then leaves it out and says so.
        """
        raise NotImplementedError


def prompt_probes() -> dict[str, type[PromptProbe]]:
    """Name -> class of every prompt probe in `headwise.heads`."""
    folder = Path(__file__).parent
    for module in module_names(folder):
        importlib.import_module(f"headwise.heads.{module}")
    found: dict[str, type[PromptProbe]] = {}
    waiting = list(PromptProbe.__subclasses__())
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if cls.name and cls.__module__.startswith("headwise."):
            found[cls.name] = cls
    return dict(sorted(found.items()))
