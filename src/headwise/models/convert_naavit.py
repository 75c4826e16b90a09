"""Turn a trained LLaVA into NAAViT or SAISA in place: `headwise.convert(model, to="naavit")`.

The model keeps its weights and its modules, and becomes a `SaisaForConditionalGeneration` with the alignment in its
config, so that it is saved and loaded as one. NAAViT works at once: nothing is trained anew. SAISA starts with a copy
of the trained projector in every layer and wants training (`recipes.train_vision_language`).
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel

from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.models._saisa_layers import check_language_model
from headwise.models.conversion import chosen_layers, replace_module
from headwise.models.saisa import LayerProjectors, SaisaConfig, SaisaForConditionalGeneration, SaisaModel

__all__ = []


def to_naavit(model: nn.Module, layers: Iterable[int] | None = None) -> nn.Module:
    """Image tokens stop attending in every layer; the projector and everything else stays."""
    return _convert(model, layers, "naavit")


def to_saisa(model: nn.Module, layers: Iterable[int] | None = None) -> nn.Module:
    """Each layer gets its own projector, a copy of the model's, and image tokens skip the layers themselves."""
    return _convert(model, layers, "saisa")


# What `headwise.convert` finds: name -> function(model, layers=None, **options).
CONVERTERS = {"naavit": to_naavit, "saisa": to_saisa}


def _convert(model: Any, layers: Iterable[int] | None, alignment: str) -> nn.Module:
    kind = type(model)
    if kind not in (LlavaForConditionalGeneration, SaisaForConditionalGeneration) or type(model.model) not in (
        LlavaModel,
        SaisaModel,
    ):
        raise UnsupportedModel(
            f"convert: {kind.__name__} is no LlavaForConditionalGeneration; the edit headwise.steering.Naavit does the "
            "same to the attention of any model with image tokens, without saving the work"
        )
    now = getattr(model.config, "alignment", "embedding")
    if now != "embedding":
        raise ValueError(f"convert: {kind.__name__} is aligned by {now!r} already; convert a model once")
    stack = model.model.language_model
    if layers is not None and len(chosen_layers(layers, len(stack.layers))) < len(stack.layers):
        raise ValueError(
            f"convert: layers is given, but {alignment} is for all {len(stack.layers)} layers; to take attention away "
            "from image tokens in some, use headwise.steering.Naavit(heads='3.*')"
        )
    if stack.config._attn_implementation == dispatch.NAME:
        raise RuntimeError("convert: probes or edits are attached to this model; remove them first")
    check_language_model(stack)
    config = copy.copy(model.config)  # the parts stay the objects that the modules hold
    config.__class__ = SaisaConfig
    config.alignment, config.implementation = alignment, "auto"
    if alignment == "saisa":
        shared = model.model.multi_modal_projector
        projectors = LayerProjectors(config)
        for projector in projectors:
            projector.load_state_dict(shared.state_dict())
        replace_module(model.model, shared, projectors)
    # As torch's parametrisations do it: an object of a subclass, with the same modules.
    model.__class__, model.model.__class__ = SaisaForConditionalGeneration, SaisaModel
    model.config = model.model.config = config
    if getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = None  # what was loaded as LLaVA is saved under older names, not found again
    model.model.align()
    return model
