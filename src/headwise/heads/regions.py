"""Visual preference: how much of a row's attention goes to each coarse token of a scene or picture, heads summed.

    p_c = sum_h A_h[row, c]

A view of `group_mass` with a group for each coarse token; `preferred_regions` makes a key group of what it prefers.

Paper: headwise/papers/lscenellm.py (Zhi et al., CVPR 2025); its selector is `ops.select_regions`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.groups import KeyGroup, positions
from headwise.heads.masses import Rows, group_mass
from headwise.ops.regions import select_regions

__all__ = ["preferred_regions", "visual_preference"]


def visual_preference(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], coarse: Bool[Tensor, "b s"], *, rows: Rows = -1
) -> Float[Tensor, "b l c"]:
    """The preference of every layer of the main tower for each coarse token, in their order; open edits act.

    coarse: which columns of the batch hold coarse tokens, equally many in every row. rows: of `group_mass`; several are
    averaged. Layers without attention are nan. Raises ValueError for rows with different numbers of coarse tokens.
    """
    columns = _columns(coarse, "visual_preference")
    groups = {}
    for region in range(columns.shape[1]):
        members = torch.zeros_like(coarse)
        groups[str(region)] = members.scatter(1, columns[:, region, None], True)
    masses = group_mass(model, inputs, groups, rows=rows)
    table = torch.stack([masses[str(region)] for region in range(columns.shape[1])], -1)
    return table.nansum(2).masked_fill(table.isnan().all(2), torch.nan)


def preferred_regions(
    preference: Float[Tensor, "b c"],
    coarse: Bool[Tensor, "e s"],
    *,
    threshold: float = 96 / 255,
    top_k: int | None = None,
) -> KeyGroup:
    """The coarse tokens that a row prefers, as a key group for probes and edits.

    preference: of one layer of `visual_preference`. threshold, top_k: of `select_regions`.
    """
    columns = _columns(coarse, "preferred_regions")
    if preference.shape != columns.shape:
        raise ValueError(
            f"preferred_regions: preference of {preference.shape[1]} regions, coarse has {columns.shape[1]}, in "
            f"{len(preference)} and {len(coarse)} rows; they must match"
        )
    chosen = select_regions(preference, threshold, top_k).to(coarse.device)
    return positions(torch.zeros_like(coarse).scatter(1, columns, chosen))


def _columns(coarse: Bool[Tensor, "b s"], where: str) -> Tensor:
    counts = coarse.sum(1)
    if not bool((counts == counts[:1]).all()) or not bool(counts.any()):
        raise ValueError(
            f"{where}: coarse has {counts.tolist()[:8]} tokens; expected as many coarse tokens in every row"
        )
    return coarse.nonzero()[:, 1].view(len(coarse), -1)
