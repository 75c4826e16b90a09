"""The Boundary-Matching Network (BMN), with class semantics-based attention, squeeze-and-excitation, both or none.

    F = base(x) (attended);  starts, ends = heads(F);  map[i, j] = 2D convolutions of samples of F around i to j + 1

Paper: headwise/papers/class_semantics_attention.py (Sridhar et al., ICCV 2021); BMN is Lin et al., ICCV 2019, and its
layers are those of JJBOY/BMN-Boundary-Matching-Network, whose checkpoints `from_jjboy` reads.

The 3D convolution over samples follows a linear sampling, so its kernel is applied to the t steps first and its results
are sampled: the same numbers from 4 GMACs a video where the official order takes 54.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from headwise.attention.class_semantics import ClassSemanticsAttention, SqueezeExcitation
from headwise.ops.boundary_matching import boundary_pairs, boundary_samples, sample_pairs

__all__ = [
    "BoundaryMatchingConfig",
    "BoundaryMatchingLoss",
    "BoundaryMatchingNetwork",
    "BoundaryMatchingOutput",
    "from_jjboy",
]

KINDS = (None, "se", "csa", "csa+se")


class BoundaryMatchingConfig(PreTrainedConfig):
    """Sizes; the defaults are the official ones for ActivityNet v1.3 with class scores of 2 x 200.

    feature_dim: channels of the input. semantic_dim: of the semantics; None takes the input for them. temporal_scale:
    steps. hidden_1d, hidden_2d, hidden_3d: channels of the sequence, the map and the sampled segments. proposal_dim: of
    the sequence that is sampled; None is hidden_1d. num_samples, samples_per_bin, boundary_ratio: of the sampling.
    groups: of the 1D convolutions. attention: None, "se", "csa" or "csa+se" (SE after CSA), on the base features.
    attention_options: of `ClassSemanticsAttention`. se_hidden: width of SE; None is hidden_1d // 16.
    map_layers: 3x3 convolutions on the map. regression: "sampled" is the official loss of the map's first channel,
    "plain" its mean squared error. positive: overlap above which a segment counts as right.
    """

    model_type = "headwise-boundary-matching"

    def __init__(
        self,
        feature_dim: int = 400,
        semantic_dim: int | None = None,
        temporal_scale: int = 100,
        hidden_1d: int = 256,
        hidden_2d: int = 128,
        hidden_3d: int = 512,
        proposal_dim: int | None = None,
        num_samples: int = 32,
        samples_per_bin: int = 3,
        boundary_ratio: float = 0.5,
        groups: int = 4,
        attention: str | None = None,
        attention_options: dict[str, Any] | None = None,
        se_hidden: int | None = None,
        map_layers: int = 2,
        regression: str = "sampled",
        positive: float = 0.9,
        **kwargs: Any,
    ) -> None:
        self.feature_dim, self.semantic_dim, self.temporal_scale = feature_dim, semantic_dim, temporal_scale
        self.hidden_1d, self.hidden_2d, self.hidden_3d = hidden_1d, hidden_2d, hidden_3d
        self.proposal_dim, self.num_samples, self.samples_per_bin = proposal_dim, num_samples, samples_per_bin
        self.boundary_ratio, self.groups, self.map_layers = boundary_ratio, groups, map_layers
        self.attention, self.attention_options, self.se_hidden = attention, attention_options or {}, se_hidden
        self.regression, self.positive = regression, positive
        super().__init__(**kwargs)

    @staticmethod
    def example() -> "BoundaryMatchingConfig":
        """A small network for tests."""
        return BoundaryMatchingConfig(
            feature_dim=8,
            temporal_scale=12,
            hidden_1d=16,
            hidden_2d=8,
            hidden_3d=12,
            num_samples=4,
            attention="csa+se",
            attention_options={"reduction": 2},
        )


@dataclass
class BoundaryMatchingOutput(ModelOutput):
    """loss: with labels. confidence `[b 2 t t]`: overlap and rightness of the segment from i to j + 1, in (0, 1), and
    0 for i > j. starts, ends `[b t]`: in (0, 1). losses: the parts, by name.
    """

    loss: Tensor | None = None
    confidence: Tensor | None = None
    starts: Tensor | None = None
    ends: Tensor | None = None
    losses: dict[str, Tensor] | None = None


def _head(width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(width, width, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv1d(width, 1, 1), nn.Sigmoid()
    )


class BoundaryMatchingNetwork(PreTrainedModel):
    """Proposals of actions from features `[b c t]` over time.

    >>> model = BoundaryMatchingNetwork(BoundaryMatchingConfig.example())
    >>> out = model(torch.randn(2, 8, 12))
    >>> out.confidence.shape, out.starts.shape
    (torch.Size([2, 2, 12, 12]), torch.Size([2, 12]))
    """

    config_class = BoundaryMatchingConfig
    config: Any
    main_input_name = "features"

    def __init__(self, config: BoundaryMatchingConfig) -> None:
        super().__init__(config)
        width, groups = config.hidden_1d, config.groups
        _check(config)
        self.base = nn.Sequential(
            nn.Conv1d(config.feature_dim, width, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(),
        )
        semantic = config.feature_dim if config.semantic_dim is None else config.semantic_dim
        kind = config.attention or ""
        self.csa = ClassSemanticsAttention(semantic, width, **config.attention_options) if "csa" in kind else None
        self.se = SqueezeExcitation(width, hidden_dim=config.se_hidden) if kind in ("se", "csa+se") else None
        self.start_head, self.end_head = _head(width, groups), _head(width, groups)
        narrow = config.proposal_dim or width
        self.proposal = nn.Sequential(nn.Conv1d(width, narrow, 3, padding=1), nn.ReLU())
        self.sample_conv = nn.Conv3d(narrow, config.hidden_3d, (config.num_samples, 1, 1))
        layers: list[nn.Module] = [nn.Conv2d(config.hidden_3d, config.hidden_2d, 1), nn.ReLU()]
        for _ in range(config.map_layers):
            layers += [nn.Conv2d(config.hidden_2d, config.hidden_2d, 3, padding=1), nn.ReLU()]
        self.map_head = nn.Sequential(*layers, nn.Conv2d(config.hidden_2d, 2, 1), nn.Sigmoid())
        self.criterion = BoundaryMatchingLoss(config.regression, config.positive)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own start is the official one."""

    def encode(
        self,
        features: Float[Tensor, "b c t"],
        semantics: Float[Tensor, "b r s"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b d t"]:
        """The base features after attention. semantics: None takes the input features."""
        encoded = self.base(features)
        if self.csa is not None:
            encoded = self.csa(encoded, features if semantics is None else semantics, mask)
        return encoded if self.se is None else self.se(encoded, None, mask)

    def forward(
        self,
        features: Float[Tensor, "b c t"],
        semantics: Float[Tensor, "b r s"] | None = None,
        labels: dict[str, Tensor] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        return_dict: bool | None = None,
    ) -> BoundaryMatchingOutput | tuple[Any, ...]:
        """labels: "overlap" `[b t t]`, "starts" and "ends" `[b t]`, as `tasks.boundary_labels` makes them.

        mask: True for real steps, for the attention's statistics. Raises ValueError for another number of steps than
        temporal_scale.
        """
        steps = self.config.temporal_scale
        if features.shape[1:] != (self.config.feature_dim, steps):
            raise ValueError(
                f"BoundaryMatchingNetwork: features are {tuple(features.shape[1:])}, expected "
                f"({self.config.feature_dim}, {steps}); rescale videos to temporal_scale steps"
            )
        encoded = self.encode(features, semantics, mask)
        starts, ends = self.start_head(encoded).squeeze(1), self.end_head(encoded).squeeze(1)
        confidence = self.map_head(self._segments(self.proposal(encoded)).relu())
        upper = torch.ones(steps, steps, dtype=confidence.dtype, device=confidence.device).triu()
        out = BoundaryMatchingOutput(confidence=confidence * upper, starts=starts, ends=ends)
        if labels is not None:
            parts = self.criterion(confidence, starts, ends, labels)
            out.losses = parts
            out.loss = parts["starts"] + parts["ends"] + 10 * parts["overlap"] + parts["right"]
        return out.to_tuple() if return_dict is False else out

    def _segments(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b o t t"]:
        """The convolution over the samples of every segment: kernel first, then the samples, then their sum."""
        config, steps = self.config, self.config.temporal_scale
        kernel = self.sample_conv.weight.flatten(3).squeeze(-1)  # [o c bins]
        products = torch.einsum("ocn,bct->bont", kernel, x)
        weights = boundary_samples(steps, config.num_samples, config.samples_per_bin, config.boundary_ratio)
        sampled = sample_pairs(products, weights.to(x.device))
        starts, ends = boundary_pairs(steps)
        whole = sampled.new_zeros(*sampled.shape[:2], steps * steps)
        place = (starts * steps + ends).to(x.device)
        whole = whole.index_copy(2, place, sampled).unflatten(2, (steps, steps))
        bias = self.sample_conv.bias
        return whole if bias is None else whole + bias[:, None, None]


def _check(config: BoundaryMatchingConfig) -> None:
    name = "BoundaryMatchingNetwork"
    if config.attention not in KINDS:
        raise ValueError(f"{name}: attention is {config.attention!r}; expected None, 'se', 'csa' or 'csa+se'")
    if config.temporal_scale < 2:
        raise ValueError(f"{name}: temporal_scale is {config.temporal_scale}; expected at least 2 steps")
    if config.feature_dim % config.groups or config.hidden_1d % config.groups:
        raise ValueError(
            f"{name}: groups {config.groups} does not divide feature_dim {config.feature_dim} and hidden_1d "
            f"{config.hidden_1d}"
        )


class BoundaryMatchingLoss(nn.Module):
    """BMN's four losses: `starts`, `ends` and `right` are balanced cross-entropies, `overlap` a squared error.

    The whole is starts + ends + 10 overlap + right. regression: "sampled" takes all segments of overlap above 0.7 and
    about as many of (0.3, 0.7] and of (0, 0.3], "plain" all of them. positive: overlap above which a segment is right;
    steps are positive above 0.5. Where nothing is positive, or nothing else, the balanced losses are plain means (the
    official code gives NaN there).
    """

    def __init__(self, regression: str = "sampled", positive: float = 0.9) -> None:
        super().__init__()
        if regression not in ("sampled", "plain") or not 0 < positive < 1:
            raise ValueError(
                f"BoundaryMatchingLoss: regression {regression!r}, positive {positive}; expected 'sampled' or 'plain', "
                "and an overlap in (0, 1)"
            )
        self.regression, self.positive = regression, positive

    def forward(
        self,
        confidence: Float[Tensor, "b 2 t t"],
        starts: Float[Tensor, "b t"],
        ends: Float[Tensor, "b t"],
        labels: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        overlap = labels["overlap"]
        upper = torch.ones(overlap.shape[-2:], dtype=torch.bool, device=overlap.device).triu().expand_as(overlap)
        return {
            "starts": _balanced(starts, labels["starts"] > 0.5),
            "ends": _balanced(ends, labels["ends"] > 0.5),
            "overlap": self._regression(confidence[:, 0], overlap, upper),
            "right": _balanced(confidence[:, 1][upper], overlap[upper] > self.positive),
        }

    def _regression(self, predicted: Tensor, overlap: Tensor, upper: Tensor) -> Tensor:
        if self.regression == "plain":
            return (predicted - overlap)[upper].square().mean()
        high = (overlap > 0.7) & upper
        chosen = high
        for kind in ((overlap > 0.3) & (overlap <= 0.7), (overlap > 0) & (overlap <= 0.3)):
            share = high.sum() / (kind & upper).sum().clamp_min(1)
            chosen = chosen | (kind & upper & (torch.rand_like(overlap) > 1 - share))
        error = torch.where(chosen, predicted - overlap, torch.zeros_like(overlap)).square().sum()
        return 0.5 * error / chosen.sum().clamp_min(1)


def _balanced(score: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy in which positives and negatives weigh the same in sum."""
    number, count = positive.sum(), positive.numel()
    ratio = count / number.clamp(1, max(1, count - 1))
    mixed = (number > 0) & (number < count)
    ones = torch.ones_like(score[:0].sum()) if score.numel() == 0 else torch.ones((), device=score.device)
    for_positive = torch.where(mixed, 0.5 * ratio, ones)
    for_negative = torch.where(mixed, 0.5 * ratio / (ratio - 1).clamp_min(1e-6), ones)
    yes, no = (score + 1e-6).log(), (1 - score + 1e-6).log()
    return -torch.where(positive, for_positive * yes, for_negative * no).mean()


_JJBOY = {
    "x_1d_b": "base",
    "x_1d_s": "start_head",
    "x_1d_e": "end_head",
    "x_1d_p": "proposal",
    "x_3d_p.0": "sample_conv",
    "x_2d_p": "map_head",
}


def from_jjboy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of JJBOY's BMN under this network's names; its fixed sampling weights are left out.

    Raises ValueError for a name that is none of theirs.
    """
    found = {}
    for name, value in state.items():
        plain = name.removeprefix("module.")
        if plain == "sample_mask":
            continue
        prefix = next((old for old in _JJBOY if plain.startswith(old + ".")), None)
        if prefix is None:
            raise ValueError(f"from_jjboy: {name} is no weight of JJBOY's BMN; give checkpoint['state_dict']")
        found[_JJBOY[prefix] + plain.removeprefix(prefix)] = value
    return found
