"""Prompts with pictures for tiny random models, and the definition of an edit written out in float64.

A prompt is written as a word: ``b`` the first token, ``w`` a word, ``P`` a picture. Rows are padded on the left.
"""

from collections.abc import Callable
from typing import Any

import torch
from tests.hf.reference import materialised
from tests.zoo import BOS, FAMILIES, IMAGE, PAD, VISION_END, VISION_START
from torch import Tensor, nn

TOKENS = 4  # of a picture
LAYERS = slice(None)  # the tiny models have two


def row(name: str, prompt: str, seed: int = 0) -> tuple[list[int], list[Tensor]]:
    """Token ids and pixel values of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    pictures = []
    for letter in prompt:
        if letter == "P":
            ids += [IMAGE] * TOKENS if name == "llava" else [VISION_START, *[IMAGE] * TOKENS, VISION_END]
            shape = (1, 3, 16, 16) if name == "llava" else (16, 96)
            pictures.append(torch.randn(shape, generator=generator))
        else:
            ids.append(BOS if letter == "b" else int(torch.randint(8, 32, (1,), generator=generator)))
    return ids, pictures


def batch(name: str, *prompts: str, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the forward; prompt i has seed + i."""
    rows = [row(name, prompt, seed + i) for i, prompt in enumerate(prompts)]
    width = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([[PAD] * (width - len(ids)) + ids for ids, _ in rows])
    given = {"input_ids": padded}
    if any(len(ids) < width for ids, _ in rows):
        given["attention_mask"] = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
    pictures = [picture for _, some in rows for picture in some]
    if pictures:
        given["pixel_values"] = torch.cat(pictures)
    if name != "llava":
        given["mm_token_type_ids"] = (padded == IMAGE).long()
        if pictures:
            given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(pictures))
    return given


def build(name: str, seed: int = 0) -> Any:
    return FAMILIES[name].build(seed)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


Rule = Callable[[int, Tensor, Tensor], Tensor]


def defined(model: Any, inputs: dict[str, Tensor], rule: Rule) -> Tensor:
    """Logits of a model whose text layers have their weights changed by `rule(layer, weights [b h t s], x [b t c])`.

    x is what comes into the layer.
    """
    layers = model.model.language_model.layers
    stream: dict[int, Tensor] = {}
    hooks = []
    for number, layer in enumerate(layers):

        def keep(_: nn.Module, args: tuple, kwargs: dict, number: int = number) -> None:
            stream[number] = (args[0] if args else kwargs["hidden_states"]).double()

        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    places = {layer.self_attn: number for number, layer in enumerate(layers)}

    def change(module: nn.Module, weights: Tensor) -> Tensor:
        return rule(places[module], weights, stream[places[module]]) if module in places else weights

    try:
        with materialised(model, change):
            return logits(model, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
