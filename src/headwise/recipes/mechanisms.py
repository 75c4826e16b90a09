"""One table of attention mechanisms in one network: each at the softmax control's parameters, and at its operations.

Every class of `headwise.attention` that maps `[b t c]` to itself stands in the same `SmallViT`. A mechanism's width and
the width of its MLPs are chosen so that the whole network has as many parameters (or operations of matrix products for
an image) as the one with softmax attention; both counts stand in every row, so that the match can be seen.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.ops.counting import flops
from headwise.recipes._pictures import patch_of
from headwise.recipes.image_classification import ImageSet, compare_attention
from headwise.recipes.matching import match_size

__all__ = ["LEFT_OUT", "attention_table", "mechanisms_for", "table_text", "write_table"]

BUDGETS = ("parameters", "operations")
CONTROL = "SoftmaxAttention"
WIDTH, RATIO, HEADS, LAYERS = 32, 2.0, 8, 2  # of the control
WIDTHS = tuple(range(16, 65, 8))

# Classes that could stand in the network but would say nothing of their own there.
LEFT_OUT = {
    "GaussianAdaptiveBlock": "a stack of GaussianAdaptiveAttention",
    "GlobalLocalCrossAttention": "softmax attention where no tokens are chosen",
    "PairwiseCrossAttention": "softmax attention where images are not paired",
}


def mechanisms_for(grid: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Name in the table -> `attention` and `attention_options` of `SmallViTConfig`, for a grid of tokens.

    Options are the class's own defaults, or what the size of the grid asks for.
    """
    rows, columns = grid
    half = (max(1, rows // 2), max(1, columns // 2))
    window: dict[str, Any] = {"window_size": half}
    channel: dict[str, Any] = {"num_groups": HEADS}
    options: dict[str, dict[str, Any]] = {
        CONTROL: {},
        "AdditiveAttention": {},
        "AgentAttention": {"num_agents": half},
        "ChannelAttention": channel,
        "GaussianAdaptiveAttention": {
            "dim": 1,
            "head_dim_axis": -1,
        },  # over tokens, each head its share of the channels
        "MixerGate": {},
        "MixtureOfHeads": {},
        "NeighborhoodAttention": {"kernel_size": 3},
        "PositionalAttention": {"pos_dim": rows * columns},  # one-hot positions
        "ReluAttention": {"is_causal": False},
        "SparsifinerAttention": {"num_prefix_tokens": 0, "coef_topk": min(8, max(1, rows * columns // 6))},
        "WindowAttention": window,
    }
    table = {name: {"attention": name, "attention_options": own} for name, own in options.items()}
    pair = {"attention": ["WindowAttention", "ChannelAttention"], "attention_options": [window, channel]}
    return {**table, "WindowAttention+ChannelAttention": pair}


def attention_table(
    data: ImageSet,
    mechanisms: Mapping[str, Mapping[str, Any]] | Iterable[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[str] = BUDGETS,
    log: Callable[[str], None] | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Rows of `compare_attention` for every mechanism and budget, the control first, which meets both.

    mechanisms: names of `mechanisms_for`, or what it returns; None is all. A row has beside the accuracies: `budget`,
    `hidden_size`, `mlp_ratio`, `spread` (standard deviation over seeds; None for one), and `of_parameters` and
    `of_operations`, its counts as shares of the control's. options: of `train_image_classifier`, the same for all. log:
    called with a line for every row, keep with the rows so far.
    Raises ValueError for unknown mechanisms and budgets.
    """
    if wrong := [budget for budget in budgets if budget not in BUDGETS]:
        raise ValueError(f"attention_table: budget is {wrong[0]!r}; choose {', '.join(BUDGETS)}")
    height, width = data.size[1:]
    patch = patch_of(height, width)
    known = mechanisms_for((height // patch, width // patch))
    wanted = known if mechanisms is None else mechanisms
    if not isinstance(wanted, Mapping):
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"attention_table: attention is {unknown[0]!r}; choose among {', '.join(known)}")
        wanted = {name: known[name] for name in wanted}
    wanted = {CONTROL: known[CONTROL], **wanted}
    count = partial(_count, data)
    whole = {budget: count(wanted[CONTROL], budget, WIDTH, RATIO) for budget in BUDGETS}

    rows = []
    for name, own in wanted.items():
        trained: dict[tuple[int, float], dict[str, Any]] = {}  # both budgets may ask for one size
        for budget in budgets:
            size = (WIDTH, RATIO)
            if name != CONTROL:
                found = match_size(partial(count, own, budget), whole[budget], WIDTHS, ratio=RATIO)
                size = (found.width, found.ratio)
            network = {"hidden_size": size[0], "mlp_ratio": size[1], "num_attention_heads": HEADS}
            if size not in trained:
                table = {name: {**own, "network": network}}
                trained[size] = compare_attention(data, table, seeds=seeds, **options)[0]
            row = trained[size]
            row = {
                "mechanism": name,
                "budget": "both" if name == CONTROL else budget,
                "hidden_size": size[0],
                "mlp_ratio": size[1],
                "parameters": row["parameters"],
                "operations": row["flops"],
                "of_parameters": row["parameters"] / whole["parameters"],
                "of_operations": row["flops"] / whole["operations"],
                "accuracy": row["accuracy"],
                "spread": stdev(row["accuracies"]) if len(seeds) > 1 else None,
                "accuracies": row["accuracies"],
            }
            rows.append(row)
            if log is not None:
                log(f"{name}, equal {budget}: {row['accuracy']:.1%}")
            if keep is not None:
                keep(rows)
            if name == CONTROL:
                break
    return rows


def _count(data: ImageSet, own: Mapping[str, Any], budget: str, width: int, ratio: float) -> int:
    channels, height, columns = data.size
    patch = patch_of(height, columns)
    config = SmallViTConfig(
        image_size=[height, columns],
        patch_size=patch,
        num_channels=channels,
        hidden_size=width,
        mlp_ratio=ratio,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        num_labels=len(data.classes),
        **own,
    )
    with torch.random.fork_rng(devices=[]):
        model = SmallViT(config).eval()
    if budget == "parameters":
        return sum(p.numel() for p in model.parameters())
    return flops(model, (torch.zeros(1, *data.size),))


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| mechanism | equal | width, MLP ratio | parameters | operations | accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        lines.append(
            f"| {row['mechanism']} | {row['budget']} | {row['hidden_size']}, {row['mlp_ratio']:.2f} "
            f"| {row['parameters']:,} ({row['of_parameters']:.3f}) "
            f"| {row['operations']:,} ({row['of_operations']:.3f}) "
            f"| {100 * row['accuracy']:.1f}{spread} |"
        )
    return "\n".join(lines) + "\n"


def write_table(
    folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any]
) -> list[Path]:
    """Write attention-table.json and attention-table.md into a folder; the files.

    tables: name of the data -> rows. about: what else the document says, such as the command and the steps.
    """
    document = folder / "attention-table.json"
    document.write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n", encoding="utf-8")
    said = [f"{key}: {value}" for key, value in about.items()]
    parts = [f"## {name}\n\n{table_text(rows)}" for name, rows in tables.items()]
    text = folder / "attention-table.md"
    text.write_text(
        "\n".join(["# Attention mechanisms in one network\n", INTRODUCTION, *parts, *said, ""]), encoding="utf-8"
    )
    return [document, text]


INTRODUCTION = """\
The same small vision transformer with one mechanism or another, trained alike. Width and MLP of each are chosen so that
the whole network has the parameters of the one with softmax attention, or its operations for an image (two for each
multiply-add of a matrix product; element-wise work counts nothing). In brackets: as a share of the control's. Accuracy
on held-out images in percent, mean and standard deviation over seeds.
"""
