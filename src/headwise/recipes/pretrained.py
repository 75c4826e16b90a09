"""Trained image classifiers to go on with: their attention converted where wanted, their head fitted to other classes.

A model that was converted and trained further is loaded again by `load_image_classifier`: what was converted stands in
its config, networks of headwise's own in `attention`, models of transformers in `headwise_convert`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from headwise.errors import InputError
from headwise.models.agent_deit import AgentDeiT
from headwise.models.conversion import convert
from headwise.models.davit import DaViTForImageClassification
from headwise.models.ninformer import NiNformerForImageClassification
from headwise.models.small_vit import SmallViT
from headwise.models.sparsifiner import SparsifinerViT
from headwise.recipes._pictures import Labelled
from headwise.recipes._trainer import CONVERTED
from headwise.recipes.image_classification import ImageSet

__all__ = ["load_image_classifier", "normalised"]

CLASSIFIERS: tuple[Any, ...] = (
    SmallViT, AgentDeiT, DaViTForImageClassification, NiNformerForImageClassification, SparsifinerViT,
)  # fmt: skip
OWN = {cls.config_class.model_type: cls for cls in CLASSIFIERS}


def load_image_classifier(
    source: str | Path, *, classes: Sequence[str] | None = None, to: str | None = None, **options: Any
) -> Any:
    """A classifier (`PreTrainedModel`) of a folder or a hub id: transformers' own, or one of headwise's.

    classes: those of the data; where they are not the checkpoint's, the last layer is made anew. to, options: as of
    `headwise.convert`, such as `to="mixture-of-head", router="learned"`; None converts nothing.
    Raises InputError for what cannot be loaded, ValueError and UnsupportedModel as `convert` does.
    """
    name = str(source)
    try:
        found: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        raise InputError(f"from: {name} is no model ({error}); give a folder with config.json, or a hub id") from None
    cls = OWN.get(str(found.get("model_type")))
    if cls is None:
        from transformers import AutoConfig, AutoModelForImageClassification

        config: Any = AutoConfig.from_pretrained(name)
        cls = AutoModelForImageClassification
    else:
        config = cls.config_class.from_pretrained(name)
    fitted: dict[str, Any] = {}
    if classes is not None and list(classes) != [config.id2label.get(number) for number in range(config.num_labels)]:
        names = dict(enumerate(classes))
        fitted = {"id2label": names, "label2id": {one: number for number, one in names.items()}}
        fitted["ignore_mismatched_sizes"] = True
    model = cls.from_pretrained(name, **fitted)
    earlier = getattr(model.config, CONVERTED, None)
    if earlier is not None:
        before = set(model.state_dict())
        _convert(model, earlier["to"], earlier["options"])
        _load_added(model, Path(name), sorted(set(model.state_dict()) - before))
    if to is not None:
        _convert(model, to, options)
    return model


def _convert(model: PreTrainedModel, to: str, options: dict[str, Any]) -> None:
    convert(model, to, **options)
    if not hasattr(model.config, "attention_options"):  # else it stands there
        setattr(model.config, CONVERTED, {"to": to, "options": options})


def _load_added(model: PreTrainedModel, folder: Path, names: list[str]) -> None:
    """What the conversion added lies in the weights, but was unknown while they were read."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    if missing := [name for name in names if name not in stored]:
        raise InputError(
            f"from: {folder} was converted, and its weights have no {missing[0]}; write it by the recipe, or by "
            "save_pretrained(folder, save_original_format=False)"
        )
    model.load_state_dict({name: stored[name] for name in names}, strict=False)


class _Normalised(Labelled):
    def __init__(self, data: Labelled, mean: Tensor, std: Tensor) -> None:
        self.data, self.mean, self.std = data, mean, std

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.data[index]
        return {**item, "pixel_values": (item["pixel_values"] - self.mean) / self.std}


def normalised(data: ImageSet, source: str | Path) -> ImageSet:
    """The images with the mean and the deviation that a checkpoint's preprocessor_config.json asks for, if it does."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = ImageProcessingMixin.get_image_processor_dict(str(source))[0]
    except OSError:
        return data
    mean, std = found.get("image_mean"), found.get("image_std")
    if mean is None or std is None or found.get("do_normalize") is False:
        return data
    values = [torch.tensor(one, dtype=torch.float32).view(-1, 1, 1) for one in (mean, std)]
    return replace(data, train=_Normalised(data.train, *values), test=_Normalised(data.test, *values))
