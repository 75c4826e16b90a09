"""What `import headwise` shows: scan a model's heads, steer them, and what both need.

The catalogue of papers and `reproduce` come from `headwise.papers`; the areas (`headwise.attend`, `headwise.steering`,
`headwise.heads`, ...) hold everything else. Raw maps are `attention_maps`, because `headwise.attention` is the area of
attention mechanisms.
"""

import os
from pathlib import Path
from typing import Any

from headwise._edits import edit_classes
from headwise._scan import Scan, compare, scan
from headwise._score import score_corpus
from headwise._select import keep_best
from headwise.attend import saving
from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.head_map import HeadMap
from headwise.attend.saving import save_edits
from headwise.hf.addresses import heads_of
from headwise.hf.load import Loaded, load
from headwise.hf.maps import attention_maps, head_outputs
from headwise.hf.session import attach, probe, steer
from headwise.models.conversion import convert
from headwise.specimens.registry import train_specimen

__all__ = [
    "Head",
    "HeadMap",
    "Loaded",
    "Scan",
    "attach",
    "attention_maps",
    "compare",
    "convert",
    "head_outputs",
    "heads_of",
    "keep_best",
    "load",
    "load_edits",
    "probe",
    "save_edits",
    "scan",
    "score_corpus",
    "steer",
    "train",
]


def load_edits(path: str | os.PathLike[str]) -> list[Edit]:
    """Read edits that `save_edits` wrote, the methods of `headwise.steering` among them."""
    known: Any = {cls.__name__: cls for cls in edit_classes().values()}
    return saving.load_edits(os.fspath(path), known)


def train(specimen: str, out: str | os.PathLike[str], *, seed: int = 0, **options: Any) -> Path:
    """Train a specimen again from nothing and write it, with its head map, to a folder, which is returned.

    options: of the specimen's own training, such as steps.
    """
    folder = train_specimen(specimen, Path(out), seed=seed, **options)
    found = scan(str(folder), probes="all")
    found.model = specimen
    found.save(folder / "heads.json")
    return folder
