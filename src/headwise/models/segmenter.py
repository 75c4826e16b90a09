"""Semantic segmentation on the feature maps of a backbone: headwise's own, and the networks they are compared with.

The maps are merged into one (`_dense.py`, which lists the backbones), a 1 x 1 convolution names the class of each of
its places, and the logits are upsampled to the image.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from headwise.models._dense import BACKBONES, DenseConfig, DenseModel, resample

__all__ = ["BACKBONES", "Segmenter", "SegmenterConfig"]


class SegmenterConfig(DenseConfig):
    """A backbone, as `DenseConfig` says, and ignore_index: the label of pixels without a loss."""

    model_type = "headwise-segmenter"

    def __init__(
        self,
        backbone: str = "davit",
        backbone_config: dict[str, Any] | None = None,
        head_width: int = 32,
        ignore_index: int = 255,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_config, head_width, **kwargs)
        self.ignore_index = ignore_index


class Segmenter(DenseModel):
    """Images `[b c h w]` to the logits of every pixel's class, `[b n h w]`, at the size of the images."""

    config_class = SegmenterConfig

    def _add_head(self, config: Any) -> None:
        self.classifier = nn.Conv2d(config.head_width, config.num_labels, 1)

    def forward(
        self,
        pixel_values: Float[Tensor, "b c h w"],
        labels: Int[Tensor, "b h w"] | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Logits, and the mean cross-entropy of the pixels where labels are given."""
        logits = resample(self.classifier(self.merged(pixel_values)), pixel_values.shape[2:])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels.long(), ignore_index=self.config.ignore_index)
        out = SemanticSegmenterOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out
