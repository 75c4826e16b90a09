"""A vision transformer trained with GLCA and PWCA beside its self-attention: fine-grained classes and identities.

    L = 1/2 sum_i (exp(-w_i) L_i + w_i)   over the branches SA, GLCA and PWCA, w learned (FairMOT's weights)

Paper: headwise/papers/dual_cross_attention.py (Zhu et al., CVPR 2022). Reconstructed where it is silent: GLCA reads the
tokens before the final norm, w starts at 0, PWCA shares the final norm and the classifier with SA, and both images of a
pair travel through the PWCA branch.

The paper classifies GLCA's class token. After its one block that token has read all tokens, and no other query: the
selection then cannot change any score, although the paper reports that random queries are worse. `readout="mean"` reads
the selected tokens, too, and there it matters, as it does with more than one block; where it does not, it is not made.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import ModelOutput

from headwise.attention.dual_cross import (
    GlobalLocalCrossAttention,
    check_partner,
    rollout_row,
    top_response_tokens,
)
from headwise.errors import UnsupportedModel
from headwise.models._dual_trunks import Trunk, trunk_of
from headwise.ops.triplets import batch_hard_triplet

__all__ = [
    "DualCrossAttention",
    "DualCrossAttentionConfig",
    "DualCrossAttentionOutput",
    "GlobalLocalBlock",
    "UncertaintyWeights",
]

BRANCHES = ("self", "local", "pair")


class DualCrossAttentionConfig(PreTrainedConfig):
    """What `DualCrossAttention` adds to a backbone.

    local_ratio: share of the patches that GLCA selects, in (0, 1]; the paper takes 0.1 for fine-grained classes, 0.3
    for re-identification. glca_layers: blocks of GLCA, 0 for none (the paper's 1). pwca: pairs in training.
    readout: GLCA's "class" token, as the paper says, or the "mean" of it and the selected tokens. selection: "rollout",
    or the paper's ablations "last" (the last layer's map alone) and "random".
    objective: cross-entropy, or cross-entropy and the triplet loss of each branch's class token with `margin`.
    weight_bound: the uncertainty weights w act within plus and minus this, since they fall for ever where a training
    loss reaches 0. backbone_config: of a transformers backbone; None where the backbone is timm's.
    """

    model_type = "headwise-dual-cross-attention"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: Any = None,
        local_ratio: float = 0.1,
        glca_layers: int = 1,
        pwca: bool = True,
        selection: str = "rollout",
        readout: str = "class",
        objective: str = "classification",
        margin: float = 0.3,
        weight_bound: float = 4.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = CONFIG_MAPPING[backbone_config["model_type"]](**backbone_config)
        self.local_ratio, self.glca_layers, self.pwca = local_ratio, glca_layers, pwca
        self.selection, self.readout, self.objective = selection, readout, objective
        self.margin, self.weight_bound = margin, weight_bound
        super().__init__(**kwargs)
        # Last: the base class would reset the attention implementation of a backbone that is already there.
        self.backbone_config = backbone_config

    @staticmethod
    def example() -> "DualCrossAttentionConfig":
        """A small network for tests."""
        from transformers import ViTConfig

        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        }
        vit = ViTConfig(image_size=16, patch_size=4, num_channels=3, **sizes)
        return DualCrossAttentionConfig(vit, local_ratio=0.3, num_labels=5)


@dataclass
class DualCrossAttentionOutput(ModelOutput):
    """loss: with labels. logits `[b n]`: their softmax is the mean of the class probabilities of SA and GLCA.

    branch_logits: "self", "local" where there is GLCA, "pair" where images were paired, each `[b n]`. features
    `[b 2c]`: the final class tokens of SA and GLCA side by side (`[b c]` without GLCA), for re-identification.
    selected `[b r]`: the queries of GLCA, the class token 0 alone where no other can matter.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    branch_logits: dict[str, Tensor] | None = None
    features: Tensor | None = None
    selected: Tensor | None = None


class GlobalLocalBlock(nn.Module):
    """One GLCA block: a pre-norm block that is evaluated at selected tokens only, while all tokens are keys.

    mlp_size: width of the MLP. eps: of the norms.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size, eps), nn.LayerNorm(hidden_size, eps)
        self.attn = GlobalLocalCrossAttention(hidden_size, num_heads)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Linear(mlp_size, hidden_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _start(module)

    def forward(self, x: Float[Tensor, "b t c"], index: Int[Tensor, "b r"]) -> Float[Tensor, "b r c"]:
        """The selected tokens after the block."""
        chosen = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        chosen = chosen + self.attn(self.norm1(x), index)
        return chosen + self.mlp(self.norm2(chosen))


class UncertaintyWeights(nn.Module):
    """`1/2 sum_i (exp(-w_i) L_i + w_i)` of named losses; w starts at 0 and acts within `bound` of it."""

    def __init__(self, names: tuple[str, ...], bound: float = 4.0) -> None:
        super().__init__()
        self.names, self.bound = names, bound
        self.log_variance = nn.Parameter(torch.zeros(len(names)))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """Raises ValueError for a loss without a weight."""
        unknown = set(losses) - set(self.names)
        if unknown:
            raise ValueError(f"UncertaintyWeights: loss {sorted(unknown)[0]!r} has no weight; there are {self.names}")
        weights = self.log_variance.clamp(-self.bound, self.bound)
        terms = [weights[self.names.index(name)].neg().exp() * loss for name, loss in losses.items()]
        used = torch.stack([weights[self.names.index(name)] for name in losses])
        return 0.5 * (torch.stack(terms).sum() + used.sum())


class DualCrossAttention(PreTrainedModel):
    """A backbone with GLCA after its last layer and, in training, PWCA in all of them.

    backbone: transformers' ViTModel, DeiTModel, Dinov2Model or a ViTForImageClassification (whose classifier becomes
    that of SA where it has as many classes), timm's VisionTransformer, or a `DualCrossAttentionConfig`, which makes an
    untrained backbone. Its pooler and its own head are not kept. num_classes: None takes those of the backbone.
    options: further arguments of the config.

    >>> from transformers import ViTConfig, ViTModel
    >>> vit = ViTModel(ViTConfig(hidden_size=32, num_attention_heads=4, image_size=16, patch_size=4))
    >>> model = DualCrossAttention(vit, num_classes=7, local_ratio=0.3)
    >>> model(torch.randn(2, 3, 16, 16)).features.shape
    torch.Size([2, 64])
    """

    config_class = DualCrossAttentionConfig
    config: Any
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, backbone: nn.Module | DualCrossAttentionConfig, num_classes: int | None = None, **options: Any
    ) -> None:
        given, config = _configured(backbone, num_classes, options)
        super().__init__(config)
        _check(config)
        head = None
        if given is None:
            given = AutoModel.from_config(config.backbone_config)
        elif isinstance(given, PreTrainedModel):
            head = getattr(given, "classifier", None)
            given = given.base_model
        else:
            head = getattr(given, "head", None)
        for unused in ("pooler", "head", "head_dist"):
            if isinstance(getattr(given, unused, None), nn.Module):
                setattr(given, unused, None)
        self.backbone: Any = given
        trunk = self._trunk
        labels: Any = config.num_labels
        width, eps = trunk.hidden_size, trunk.norm.eps
        kept = isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (width, labels)
        self.classifier = head if isinstance(head, nn.Linear) and kept else _start(nn.Linear(width, labels))
        self.local_blocks = nn.ModuleList(
            GlobalLocalBlock(width, trunk.num_heads, trunk.mlp_size, eps=eps) for _ in range(config.glca_layers)
        )
        self.local_norm = nn.LayerNorm(width, eps) if config.glca_layers else None
        self.local_classifier = _start(nn.Linear(width, labels)) if config.glca_layers else None
        wanted = (True, bool(config.glca_layers), config.pwca)
        names = tuple(name for name, has in zip(BRANCHES, wanted, strict=True) if has)
        self.loss_weights = UncertaintyWeights(names, config.weight_bound) if len(names) > 1 else None
        self.post_init()

    @property
    def _trunk(self) -> Trunk:
        return trunk_of(self.backbone)

    def _init_weights(self, module: nn.Module) -> None:
        """Backbones come as they are, and the parts that are added start themselves."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does. Raises UnsupportedModel for a timm backbone, whose sizes are in no config."""
        if self.config.backbone_config is None:
            raise UnsupportedModel(
                "DualCrossAttention: save_pretrained needs a transformers backbone; with timm's save the state_dict, "
                "and load it into the same network wrapped again"
            )
        return super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        pixel_values: Float[Tensor, "b c h w"],
        labels: Int[Tensor, " b"] | None = None,
        partner: Int[Tensor, " b"] | None = None,
        return_dict: bool | None = None,
        **backbone_options: Any,
    ) -> DualCrossAttentionOutput | tuple[Any, ...]:
        """Class scores, features and, with labels, the loss of all branches that ran.

        Images are paired in training, and whenever partner is given; partner None then draws a permutation.
        backbone_options: for the backbone's forward, as interpolate_pos_encoding. Raises ValueError for a partner that
        is no permutation of the batch.
        """
        batch, trunk = len(pixel_values), self._trunk
        if partner is not None:
            if not self.config.pwca:
                raise ValueError(
                    "DualCrossAttention: partner is given but pwca is False; make the model with pwca=True"
                )
            check_partner(partner, batch)
        elif self.training and self.config.pwca:
            if batch == 1:
                _warn_single()
            partner = torch.randperm(batch).to(pixel_values.device)
        record = self._selects and self.config.selection != "random"
        tokens, scored = trunk.run(pixel_values, partner, record, backbone_options)
        normed: Tensor = trunk.norm(tokens[:, 0])
        classes = {"self": normed[:batch]}
        scores = {"self": self.classifier(normed[:batch])}
        index = None
        if self.local_norm is not None and self.local_classifier is not None:
            index = self._select(tokens[:batch], scored, trunk.num_prefix_tokens)
            classes["local"] = self.local_norm(self._local(tokens[:batch], index))
            scores["local"] = self.local_classifier(classes["local"])
        if partner is not None:
            classes["pair"] = normed[batch:]
            scores["pair"] = self.classifier(normed[batch:])
        loss = None
        if labels is not None:
            losses = {name: self._loss(scores[name], classes[name], labels) for name in scores}
            loss = losses["self"] if self.loss_weights is None else self.loss_weights(losses)
        read = [name for name in ("self", "local") if name in scores]
        out = DualCrossAttentionOutput(
            loss=loss,
            logits=_vote([scores[name] for name in read]),
            branch_logits=scores,
            features=torch.cat([classes[name] for name in read], -1),
            selected=index,
        )
        return out.to_tuple() if return_dict is False else out

    @torch.no_grad()
    def responses(self, pixel_values: Float[Tensor, "b c h w"], **backbone_options: Any) -> Float[Tensor, "b n"]:
        """Rollout response of every patch: its share of what reaches the class token, prefix tokens left out."""
        trunk = self._trunk
        _, scored = trunk.run(pixel_values, None, True, backbone_options)
        return rollout_row(scored)[:, trunk.num_prefix_tokens :]

    @property
    def _selects(self) -> bool:
        """Whether the selected tokens can change anything."""
        layers = self.config.glca_layers
        return bool(layers) and (layers > 1 or self.config.readout == "mean")

    def _select(self, tokens: Tensor, scored: Any, prefix: int) -> Tensor:
        if not self._selects:
            return torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        if self.config.selection == "random":
            response = torch.rand(tokens.shape[:2], device=tokens.device)
        elif self.config.selection == "last":
            response = rollout_row(scored[-1:], residual=0.0)
        else:
            response = rollout_row(scored)
        chosen = top_response_tokens(response, self.config.local_ratio, num_prefix_tokens=prefix)
        return torch.cat([torch.zeros_like(chosen[:, :1]), chosen], 1)  # the class token reads, too

    def _local(self, tokens: Tensor, index: Tensor) -> Tensor:
        chosen = tokens
        for block in self.local_blocks:
            chosen = block(tokens, index)
            tokens = tokens.scatter(1, index[..., None].expand(-1, -1, tokens.shape[2]), chosen)
        return chosen.mean(1) if self.config.readout == "mean" else chosen[:, 0]

    def _loss(self, scores: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(scores, labels)
        if self.config.objective == "reidentification":
            loss = loss + batch_hard_triplet(classes, labels, margin=self.config.margin)
        return loss


def _vote(scores: list[Tensor]) -> Tensor:
    """Scores whose softmax is the mean of the branches' class probabilities; those of one branch as they are."""
    if len(scores) == 1:
        return scores[0]
    every = torch.stack(scores)
    heights = every.logsumexp(-1, keepdim=True)
    return (every - heights).logsumexp(0) - torch.tensor(float(len(scores))).log() + heights.mean(0)


def _configured(backbone: Any, num_classes: int | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The backbone that was given, if any, and the whole config."""
    if isinstance(backbone, DualCrossAttentionConfig):
        if num_classes is not None or options:
            raise TypeError("DualCrossAttention: a config is given, which holds num_classes and all other options")
        if backbone.backbone_config is None:
            raise UnsupportedModel(
                "DualCrossAttention: the config has no backbone_config (the backbone was timm's); give the network "
                "itself"
            )
        return None, backbone
    trunk_of(backbone)  # refuses before anything is made
    inner = backbone.base_model.config if isinstance(backbone, PreTrainedModel) else None
    found = getattr(backbone, "num_classes", None) if inner is None else backbone.config.num_labels
    classes = found if num_classes is None else num_classes
    if not classes:
        raise ValueError(f"DualCrossAttention: num_classes is {num_classes} and the backbone has none; give a number")
    return backbone, DualCrossAttentionConfig(inner, num_labels=classes, **options)


def _check(config: Any) -> None:
    if not 0 < config.local_ratio <= 1:
        raise ValueError(f"DualCrossAttention: local_ratio is {config.local_ratio}; expected a share in (0, 1]")
    for name, known in (
        ("selection", ("rollout", "last", "random")),
        ("readout", ("class", "mean")),
        ("objective", ("classification", "reidentification")),
    ):
        if getattr(config, name) not in known:
            raise ValueError(f"DualCrossAttention: {name} is {getattr(config, name)!r}; choose from {', '.join(known)}")


def _warn_single() -> None:
    import warnings

    warnings.warn(
        "DualCrossAttention: a batch of one image is paired with itself, which regularises nothing; use larger "
        "batches, or pwca=False to silence this",
        stacklevel=3,
    )


def _start(linear: nn.Linear) -> nn.Linear:
    """DeiT's start: a truncated normal of 0.02."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
