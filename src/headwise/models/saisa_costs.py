"""What a LLaVA, NAAViT or SAISA costs in operations, from its config: prefill, and training in two stages.

Two operations for a multiply-add of a matrix product, as torch's `FlopCounterMode` counts; of attention every score of
the rows that are computed, masked ones too. Prefill, for t text and v image tokens, n = t + v, per layer:

    LLaVA   8 n d^2 + 4 n^2 d + 6 n d m
    NAAViT  4 t d^2 + 4 n d^2 + 4 t n d + 6 n d m            (the last layer's FFN on t rows)
    SAISA   4 t d^2 + 4 n d^2 + 4 t n d + 6 t d m + 2 v (c d + d^2)

written for as many key heads as heads; grouped keys and other head sizes are counted as they are.

Paper: headwise/papers/saisa.py (Yuan et al., 2025), whose 66 % is at 64 text tokens or so.
"""

from typing import Any, NamedTuple

__all__ = ["PrefillParts", "prefill_flops", "prefill_parts", "training_flops", "vision_flops"]


class PrefillParts(NamedTuple):
    """Operations of a prefill: projectors of image features; q, k, v and o projections; scores and weighted values;
    feed-forward networks. Neither the vision tower nor the output head is in it."""

    projectors: int
    projections: int
    scores: int
    feed_forward: int


class _Sizes(NamedTuple):
    alignment: str
    d: int
    m: int
    layers: int
    heads: int  # width of all query heads
    keys: int  # width of all key heads
    features: int
    vocabulary: int


def _sizes(config: Any) -> _Sizes:
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    chosen = config.vision_feature_layer
    return _Sizes(
        alignment=getattr(config, "alignment", "embedding"),
        d=text.hidden_size,
        m=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=head * text.num_attention_heads,
        keys=head * text.num_key_value_heads,
        features=vision.hidden_size * (1 if isinstance(chosen, int) else len(chosen)),
        vocabulary=text.vocab_size,
    )


def _check(where: str, text: int, image: int) -> None:
    if text < 1 or image < 0:
        raise ValueError(f"{where}: {text} text and {image} image tokens; expected 1 or more, and 0 or more")


def prefill_parts(config: Any, text: int, image: int) -> PrefillParts:
    """Operations of one prefill of `text` text and `image` image tokens. config: a `SaisaConfig`, or LLaVA's.

    Raises ValueError for fewer than 1 text token.
    """
    _check("prefill_parts", text, image)
    of, n = _sizes(config), text + image
    queries = n if of.alignment == "embedding" else text
    fed = {"embedding": n * of.layers, "naavit": n * of.layers - image, "saisa": text * of.layers}[of.alignment]
    projectors = image * (of.layers if of.alignment == "saisa" else 1)
    return PrefillParts(
        projectors=2 * projectors * (of.features * of.d + of.d * of.d),
        projections=4 * of.layers * of.d * (queries * of.heads + n * of.keys),
        scores=4 * of.layers * queries * n * of.heads,
        feed_forward=6 * fed * of.d * of.m,
    )


def prefill_flops(config: Any, text: int, image: int) -> int:
    """Operations of one prefill in all: the sum of `prefill_parts`.

    >>> from headwise.models.saisa import SaisaConfig
    >>> small = SaisaConfig.example("embedding"), SaisaConfig.example("saisa")
    >>> [prefill_flops(config, text=10, image=16) for config in small]
    [3387648, 1845504]
    """
    return sum(prefill_parts(config, text, image))


def vision_flops(config: Any) -> int:
    """Operations of a CLIP vision tower for one image."""
    vision = config.vision_config
    d, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    n = patches + 1
    layer = 8 * n * d * d + 4 * n * n * d + 4 * n * d * vision.intermediate_size
    return vision.num_hidden_layers * layer + 2 * patches * 3 * vision.patch_size**2 * d


def training_flops(config: Any, text: int, image: int, stage: str, *, vision: bool = True) -> int:
    """Operations of a forward and a backward pass of one sample, output head included.

    stage: "projectors" trains them alone, "all" the language model as well; the vision tower, of CLIP's form, is never
    trained. vision: count its forward pass. A product costs once more for the gradient of its input and once more for
    that of its weights, where they are needed; the text rows of the first layer need none in the first stage, except
    in LLaVA, where they share a tensor with the image rows. Attention with formed weights; fused kernels form the
    scores again in the backward pass.

    Raises ValueError for fewer than 1 text or image token, and for another stage.
    """
    _check("training_flops", text, image - 1)
    if stage not in ("projectors", "all"):
        raise ValueError(f"training_flops: stage is {stage!r}; choose 'projectors' or 'all'")
    of, parts, train = _sizes(config), prefill_parts(config, text, image), stage == "all"
    head = 2 * (text if of.alignment != "embedding" else text + image) * of.d * of.vocabulary
    products = parts.projections + parts.feed_forward + head
    total = products * (3 if train else 2) + parts.scores * 3
    if not train and of.alignment != "embedding":
        queries, values = 2 * text * of.d * of.heads, 4 * text * of.d * of.keys
        total -= queries + values + parts.scores // (4 * of.layers) * 2
    first = parts.projectors * of.features // (of.features + of.d)  # its input, the features, needs no gradient
    total += 2 * first + 3 * (parts.projectors - first)
    return total + (vision_flops(config) if vision else 0)
