"""A visual attention sink put into a trained LLaVA by hand: image tokens without content that draw attention.

Sinks as large models have them (Kang et al., 2025) do not appear in minutes of training, so this one is made: what is a
sink is then known, and a detector and an edit can be judged by it.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SinkProjector", "implant_visual_sink"]


class SinkProjector(nn.Module):
    """A LLaVA projector whose output has one more dimension, which is 0 but at the image tokens of the sinks.

    There it is `share / sqrt(1 - share^2)` times the norm of the others, so that it holds `share` of the row's norm.
    """

    cells: Tensor

    def __init__(self, projector: nn.Module, cells: tuple[int, ...], share: float) -> None:
        super().__init__()
        self.projector, self.factor = projector, share / math.sqrt(1 - share**2)
        self.register_buffer("cells", torch.tensor(cells))

    def forward(self, features: Tensor) -> Tensor:
        rows = self.projector(features)
        sunk = torch.zeros_like(rows[..., :1])
        sunk[..., self.cells, :] = self.factor * rows[..., self.cells, :].norm(dim=-1, keepdim=True)
        return torch.cat([rows, sunk], -1)


@torch.no_grad()
def implant_visual_sink(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    cells: tuple[int, ...] = (5, 10),
    share: float = 0.9,
    logit: float = 4.0,
    first_layer: int = 1,
) -> Any:
    """A copy of a LLaVA with a Llama inside whose image tokens `cells` are visual sinks; `model` stays as it is.

    1. The copy's residual stream has one dimension more, the last. Nothing of the model reads or writes it, and what
       RMSNorm divides by is corrected for it, so that rows in which it is 0 are computed as before.
    2. Behind the projector it is set at the image tokens `cells` (counted within a picture): it holds `share` of the
       row's norm. `max |x / RMS(x)|` is then `share * sqrt(d)` there, with d the new width, and nothing is added to the
       rest of the row, which RMSNorm now shrinks by `sqrt(1 - share^2)`.
    3. The key projections of layers `first_layer` and up get one more column, a rank-one term that reads the dimension,
       in every head. Its direction, one for each layer and head, is the least-squares solution for "adds `logit` to the
       score" over the rows of `inputs` behind the picture, before rotary embedding, and is then scaled so that it does
       so on average. The layers are done in order, each on what the ones before now make.
    4. The value projections do not read the dimension: a sink has nothing more to give than its shrunk content.

    inputs: model inputs with one picture a row, such as `vision_language_inputs` with captions begun; only rows behind
    the picture count. Give pictures with nothing at the cells (`shapes_captions(..., empty=cells)`), here and later.
    Raises ValueError for cells that the picture has not, a share outside (0, 1), a layer that is none, and TypeError
    for a model that is no LLaVA with a Llama.
    """
    from transformers import LlamaModel, LlavaForConditionalGeneration

    if not isinstance(model, LlavaForConditionalGeneration) or not isinstance(model.model.language_model, LlamaModel):
        raise TypeError(f"implant_visual_sink: {type(model).__name__} is no LLaVA with a Llama inside")
    if not 0 < share < 1:
        raise ValueError(f"implant_visual_sink: share is {share}; it must lie between 0 and 1")
    config: Any = model.config.text_config
    layers = config.num_hidden_layers
    if not 0 <= first_layer < layers:
        raise ValueError(f"implant_visual_sink: first_layer is {first_layer}; the model has layers 0 to {layers - 1}")
    images = inputs["input_ids"] == model.config.image_token_id
    tokens = int(images[0].sum())
    if not cells or not all(0 <= cell < tokens for cell in cells):
        raise ValueError(f"implant_visual_sink: cells is {cells}; a picture has tokens 0 to {tokens - 1}")
    made = _widened(model)
    made.model.multi_modal_projector = SinkProjector(made.model.multi_modal_projector, cells, share)
    for layer in range(first_layer, layers):
        _draw_attention(made, inputs, images, layer, logit, cells)
    return made.eval()


def _widened(model: Any) -> Any:
    """The same model with one more dimension in the language model's residual stream, unread and unwritten."""
    made = copy.deepcopy(model)
    text = made.model.language_model
    width = text.config.hidden_size
    shrink = math.sqrt(width / (width + 1))
    for config in {id(c): c for c in (text.config, made.config.text_config)}.values():
        config.hidden_size = width + 1
        config.head_dim = text.layers[0].self_attn.head_dim
        config.rms_norm_eps = config.rms_norm_eps * width / (width + 1)
    for module in text.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.cat([module.weight * shrink, module.weight.new_ones(1) * shrink]))
            module.variance_epsilon = module.variance_epsilon * width / (width + 1)
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(nn.functional.pad(linear.weight, (0, 1)))
            linear.in_features += 1
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight = nn.Parameter(nn.functional.pad(linear.weight, (0, 0, 0, 1)))
            linear.out_features += 1
    text.embed_tokens.weight = nn.Parameter(nn.functional.pad(text.embed_tokens.weight, (0, 1)))
    text.embed_tokens.embedding_dim += 1
    made.lm_head.weight = nn.Parameter(nn.functional.pad(made.lm_head.weight, (0, 1)))
    made.lm_head.in_features += 1
    return made


def _draw_attention(
    made: Any, inputs: dict[str, Tensor], images: Tensor, layer: int, logit: float, cells: tuple[int, ...]
) -> None:
    """Give the keys of a layer their new column."""
    text = made.model.language_model
    attention = text.layers[layer].self_attn
    seen: dict[str, Any] = {}

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0] if args else kwargs["hidden_states"]
        seen["rows"], seen["rotary"] = rows, kwargs["position_embeddings"]

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        made(**inputs)
    finally:
        handle.remove()
    rows, (cosine, sine) = seen["rows"], seen["rotary"]
    b, t, _ = rows.shape
    size = attention.head_dim
    q = _rotated(attention.q_proj(rows).view(b, t, -1, size), cosine, sine)
    place = torch.stack([row.nonzero()[:, 0][list(cells)] for row in images])
    behind = torch.arange(t, device=rows.device) > images.int().cumsum(1).argmax(1)[:, None]
    if "attention_mask" in inputs:
        behind &= inputs["attention_mask"].bool()
    cosine, sine = (x.expand(b, -1, -1) for x in (cosine, sine))
    asking = []
    for number in range(len(cells)):
        at = place[:, number, None, None].expand(-1, 1, size)
        back = _rotated(q, cosine.gather(1, at), -sine.gather(1, at))  # undo the key's own rotation
        value = rows[torch.arange(b), place[:, number], -1]
        asking.append((back * value[:, None, None, None])[behind])
    # [n, heads, size]: the score of a sink is `asking . column * scale`, whatever else its key holds.
    queries = torch.cat(asking) * attention.scaling
    kv = attention.k_proj.out_features // size
    queries = queries.view(len(queries), kv, -1, size).transpose(0, 1).reshape(kv, -1, size)
    square = queries.mT @ queries / queries.shape[1]
    square = square + 1e-3 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(size)
    mean = queries.mean(1)
    column = torch.linalg.solve(square, mean)
    column = column * (logit / (column * mean).sum(1, keepdim=True))
    weight = attention.k_proj.weight.clone()
    weight[:, -1] = column.flatten()
    attention.k_proj.weight = nn.Parameter(weight)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of `[b, t, h, d]` by angles `[b, t, d]`."""
    left, right = x.chunk(2, -1)
    return x * cosine[:, :, None] + torch.cat([-right, left], -1) * sine[:, :, None]
