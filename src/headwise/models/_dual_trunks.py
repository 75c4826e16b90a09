"""The two kinds of vision transformer that `DualCrossAttention` wraps: what it needs to know of them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.errors import UnsupportedModel
from headwise.hf.pairing import Scored, pair_attention

TIMM_BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
TIMM_ATTENTION = ("qkv", "q_norm", "k_norm", "proj", "proj_drop", "num_heads", "scale")


class TransformersTrunk:
    """A ViTModel or one built like it (DeiT, DINOv2): `embeddings.cls_token`, layers on the interface, `layernorm`."""

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.base_model
        embeddings: Any = getattr(base, "embeddings", None)
        config = base.config
        name = type(model).__name__
        if not isinstance(getattr(embeddings, "cls_token", None), Tensor):
            raise UnsupportedModel(
                f"{name} has no class token (embeddings.cls_token), whose attention selects the patches; "
                "wrap a network that has one, as ViTModel, DeiTModel or Dinov2Model"
            )
        if not isinstance(getattr(base, "layernorm", None), nn.LayerNorm):
            raise UnsupportedModel(f"{name} has no final LayerNorm called layernorm; wrap one built as ViTModel is")
        self.model, self.norm = base, base.layernorm
        positions, patches = embeddings.position_embeddings.shape[1], embeddings.patch_embeddings.num_patches
        self.num_prefix_tokens = positions - patches + int(getattr(config, "num_register_tokens", 0) or 0)
        self.hidden_size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.mlp_size = int(getattr(config, "intermediate_size", 0) or config.hidden_size * config.mlp_ratio)

    def run(
        self, pixel_values: Tensor, partner: Tensor | None, record: bool, options: dict[str, Any]
    ) -> tuple[Tensor, list[Scored]]:
        """Tokens before the final norm, `[b t c]` or `[2b t c]` with the paired images after the others."""
        caught: list[Tensor] = []
        hook = self.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        images = pixel_values if partner is None else torch.cat([pixel_values, pixel_values])
        try:
            if partner is None and not record:
                self.model(images, **options)
                return caught[0], []
            with pair_attention(self.model, partner, single=len(pixel_values), record=record) as seen:
                self.model(images, **options)
        finally:
            hook.remove()
        return caught[0], seen


class TimmTrunk:
    """A network with the parts of timm's VisionTransformer, run block by block from its own submodules."""

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        if prefix < 1 or not getattr(model, "has_class_token", True):
            raise UnsupportedModel(
                f"{name} has no class token, whose attention selects the patches; wrap a network that has one, as "
                "timm's deit_tiny_patch16_224"
            )
        for block in model.blocks:
            missing = [part for part in TIMM_BLOCK if not hasattr(block, part)]
            missing += [f"attn.{part}" for part in TIMM_ATTENTION if not missing and not hasattr(block.attn, part)]
            if missing:
                raise UnsupportedModel(
                    f"{name}: its blocks ({type(block).__name__}) have no {missing[0]}; only timm's plain pre-norm "
                    "block is known here"
                )
        first = model.blocks[0]
        self.model, self.norm, self.num_prefix_tokens = model, model.norm, prefix
        self.hidden_size, self.num_heads = model.embed_dim, first.attn.num_heads
        self.mlp_size = first.mlp.fc1.out_features

    def run(
        self, pixel_values: Tensor, partner: Tensor | None, record: bool, options: dict[str, Any]
    ) -> tuple[Tensor, list[Scored]]:
        if options:
            raise ValueError(f"DualCrossAttention: {sorted(options)[0]} is no argument of a timm backbone")
        model, single, seen = self.model, len(pixel_values), []
        images = pixel_values if partner is None else torch.cat([pixel_values, pixel_values])
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for block in model.blocks:
            mixed = self._attend(block.attn, block.norm1(x), partner, single, seen if record else None)
            x = x + block.drop_path1(block.ls1(mixed))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, seen

    def _attend(self, attn: Any, x: Tensor, partner: Tensor | None, single: int, seen: list[Scored] | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = attn.qkv(x).view(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if seen is not None:
            seen.append((q[:single].detach(), k[:single].detach(), float(attn.scale)))
        drop = getattr(getattr(attn, "attn_drop", None), "p", 0.0) if attn.training else 0.0

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=float(attn.scale))

        if partner is None:
            out = fused(q, k, v)
        else:
            ours, theirs = k[single:], v[single:]
            keys, values = torch.cat([ours, ours[partner]], 2), torch.cat([theirs, theirs[partner]], 2)
            out = torch.cat([fused(q[:single], k[:single], v[:single]), fused(q[single:], keys, values)])
        out = out.transpose(1, 2).flatten(2)
        inner = getattr(attn, "norm", None)
        return attn.proj_drop(attn.proj(out if inner is None else inner(out)))


Trunk = TransformersTrunk | TimmTrunk


def trunk_of(model: nn.Module) -> Trunk:
    """How to run a backbone. Raises UnsupportedModel for a network of neither kind."""
    if isinstance(model, PreTrainedModel):
        return TransformersTrunk(model)
    if all(hasattr(model, part) for part in ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm")):
        return TimmTrunk(model)
    raise UnsupportedModel(
        f"DualCrossAttention: the backbone is {type(model).__name__}; give transformers' ViTModel, DeiTModel, "
        "Dinov2Model or ViTForImageClassification, or timm's VisionTransformer"
    )
