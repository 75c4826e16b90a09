"""Heads of every layer of the paper's networks: MoH-ViT (in TransNeXt), MoH-DiT and MoH-LLaMA3, as data.

Paper: headwise/papers/mixture_of_head_attention.py (Jin et al., 2024). Sizes are those of the official code.
Notes: the percentage in a network's name is the active heads of all layers over all heads, rounded; a mean of the
layers' own shares would give other numbers (80 % for B-75).
"""

from collections.abc import Sequence

from headwise.attention.mixture_of_head import HeadSplit

__all__ = ["MOH_PRESETS", "activated_heads"]

Stage = tuple[int, HeadSplit]  # number of layers, and what each of them has

_PRESETS: dict[str, tuple[Stage, ...]] = {
    "moh-vit-b-75": (
        (5, HeadSplit(4, 4, 0)),
        (5, HeadSplit(8, 8, 0)),
        (23, HeadSplit(16, 4, 8)),
        (5, HeadSplit(32, 5, 16)),
    ),
    "moh-vit-b-50": (
        (5, HeadSplit(4, 2, 2)),
        (5, HeadSplit(8, 2, 4)),
        (23, HeadSplit(16, 2, 6)),
        (5, HeadSplit(32, 4, 8)),
    ),
    "moh-vit-s-80": (
        (5, HeadSplit(3, 3, 0)),
        (5, HeadSplit(6, 6, 0)),
        (22, HeadSplit(12, 3, 6)),
        (5, HeadSplit(24, 8, 12)),
    ),
    "moh-vit-s-75": (
        (5, HeadSplit(3, 3, 0)),
        (5, HeadSplit(6, 6, 0)),
        (22, HeadSplit(12, 3, 6)),
        (5, HeadSplit(24, 4, 12)),
    ),
    "moh-dit-xl-90": ((9, HeadSplit(8, 8, 0)), (10, HeadSplit(16, 16, 0)), (9, HeadSplit(24, 16, 3))),
    "moh-llama3-8b-75": ((32, HeadSplit(32, 16, 8)),),
}

MOH_PRESETS: dict[str, tuple[HeadSplit, ...]] = {
    name: tuple(split for layers, split in stages for _ in range(layers)) for name, stages in _PRESETS.items()
}


def activated_heads(layers: Sequence[HeadSplit]) -> float:
    """Heads in use over heads, summed over layers.

    >>> round(activated_heads(MOH_PRESETS["moh-vit-b-75"]), 3)
    0.75
    """
    return sum(split.shared + split.top_k for split in layers) / sum(split.heads for split in layers)
