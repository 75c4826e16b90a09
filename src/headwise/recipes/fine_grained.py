"""Fine-grained classes with dual cross-attention (DCAL): birds, cars, or whatever folders of pictures hold.

A vision transformer is trained by transformers' Trainer with GLCA, which reads the image again from its most
responsible patches, and PWCA, in which another image's keys distract. Without `dual` it is the same network alone. Data
as for the image classifier: `load_images`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.recipes._dual import wrap
from headwise.recipes._trainer import Progress, train_with
from headwise.recipes.image_classification import ImageSet

__all__ = ["TrainedFineGrained", "train_fine_grained"]


@dataclass(frozen=True)
class TrainedFineGrained:
    """A trained network and the shares of test images that it names right.

    accuracy: by the mean of the class probabilities of self-attention and GLCA. alone: by self-attention alone, which
    costs nothing more than the backbone.
    """

    model: DualCrossAttention
    accuracy: float
    alone: float
    parameters: int


def train_fine_grained(
    data: ImageSet,
    *,
    dual: bool = True,
    backbone: str | None = None,
    local_ratio: float = 0.1,
    steps: int = 600,
    batch: int = 32,
    learning_rate: float | None = None,
    weight_decay: float = 0.05,
    out: str | Path | None = None,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedFineGrained:
    """Train one network and test it. dual: False trains the backbone alone, for comparison.

    backbone: a ViT, DeiT or DINOv2 of transformers by hub id or folder (the paper's are DeiT and ViT); None makes a
    small ViT with sizes in `network`. local_ratio: share of the patches that GLCA selects. learning_rate: None is 2e-3,
    with a backbone 3e-5. options: further ones of `DualCrossAttentionConfig`. training: further `TrainingArguments`.
    out: folder that the model is written to. progress: called with steps done, steps, and a word.
    Raises InputError for a backbone that cannot be had, UnsupportedModel for one without a class token.
    """
    from transformers import set_seed

    set_seed(seed)
    wrapped = wrap(
        data.size,
        len(data.classes),
        dual=dual,
        backbone=backbone,
        network=network,
        local_ratio=local_ratio,
        id2label=dict(enumerate(data.classes)),
        label2id={name: index for index, name in enumerate(data.classes)},
        **(options or {}),
    )
    train_with(
        wrapped.model,
        data.train,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate or (2e-3 if backbone is None else 3e-5),
        weight_decay=weight_decay,
        seed=seed,
        out=out,
        training={"remove_unused_columns": False, **(training or {})},
        progress=progress,
        data_collator=wrapped.collate,
    )
    right = alone = 0
    for said, given in wrapped.read(data.test):
        right += int((said.logits.argmax(-1).cpu() == given["labels"]).sum())
        alone += int((said.branch_logits["self"].argmax(-1).cpu() == given["labels"]).sum())
    count = sum(p.numel() for p in wrapped.model.parameters())
    return TrainedFineGrained(wrapped.model, right / len(data.test), alone / len(data.test), count)
