"""Folders that results are written to."""

import os
import tempfile
from pathlib import Path

from headwise.errors import InputError

__all__ = ["writable_folder"]


def writable_folder(out: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing. Raises InputError where nothing can be written into it."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"out: {folder} cannot be written ({error.strerror or error}); choose another folder"
        ) from None
    return folder
