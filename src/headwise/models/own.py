"""Which class reads a checkpoint that one of headwise's own networks wrote."""

from importlib import import_module
from importlib.util import find_spec

from transformers import PreTrainedModel

from headwise.errors import InputError

__all__ = ["own_class"]

PREFIX = "headwise-"  # of model_type; what follows names the file of the network


def own_class(model_type: str, name: str) -> type[PreTrainedModel]:
    """The class of a checkpoint by what its config.json says: ("headwise-small-vit", "SmallViT") -> `SmallViT`.

    Raises InputError where this release has no such network.
    """
    file = model_type.removeprefix(PREFIX).replace("-", "_")
    place = f"headwise.models.{file}"
    known = file.isidentifier() and find_spec(place) is not None
    found = getattr(import_module(place), name, None) if known else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise InputError(f"model: {name or 'a network'} of type {model_type} is none that this headwise release has")
    return found
