"""Models, pictures and rows of visual attention redistribution; its record is in visual_attention_redistribution.py."""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.attend.edit import Edit
from headwise.attend.edits import BiasGroup, EditRows, ScaleGroup
from headwise.attend.groups import positions
from headwise.heads.masses import group_mass
from headwise.heads.sinks import find_sinks, massive_values
from headwise.hf.session import steer
from headwise.hf.sites import record
from headwise.papers._picture_runs import (
    CHUNK,
    Edits,
    Scores,
    at_cells,
    caption_inputs,
    polled,
    random_cells,
    scored,
    shown,
)
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.specimens.vision_language import SIGMA, vision_language_model
from headwise.specimens.visual_sink import implant_visual_sink
from headwise.steering.visual_attention_redistribution import (
    VisualAttentionRedistribution,
    image_centric_rows,
    redistribute_attention,
)
from headwise.tasks.captions import CaptionedShapes, shapes_captions

PICTURES, WRITTEN = 1024, 64  # unseen pictures; pictures on which the sink is made
SINKS = (5, 10)  # the cells of the implanted sinks, empty in every picture
LAYERS = slice(1, None)  # those in which the sink draws attention; the paper's 2 to the last but one would be layer 2
SHARE = 0.75  # of sqrt(hidden size), which phi cannot exceed: the threshold here, where 20 is out of reach
HELD = 0.98  # the share of a sink's row that its massive dimension holds behind the projector
TRANSFER = 0.6
COST = 0.1  # by how much hiding as many object cells must lower accuracy


@dataclass
class Subject:
    """The trained model, a copy with two implanted visual sinks, and pictures with nothing at their cells."""

    plain: Any
    sunk: Any
    counterfactual: CaptionedShapes
    ordinary: CaptionedShapes

    @property
    def threshold(self) -> float:
        return SHARE * math.sqrt(self.sunk.config.text_config.hidden_size)

    def var(self, **options: Any) -> VisualAttentionRedistribution:
        chosen: dict[str, Any] = {"transfer": TRANSFER, "sink_threshold": self.threshold, "layers": LAYERS}
        return VisualAttentionRedistribution(**{**chosen, **options})


def subject(run: Run) -> Subject:
    plain = vision_language_model(run.seed)
    seed = 50_000 + 10 * run.seed
    written = shapes_captions(WRITTEN, sigma=SIGMA, counterfactual=True, empty=SINKS, seed=seed)
    sunk = implant_visual_sink(plain, caption_inputs(written), cells=SINKS, share=HELD)
    return Subject(
        plain,
        sunk,
        shapes_captions(PICTURES, sigma=SIGMA, counterfactual=True, empty=SINKS, seed=seed + 1),
        shapes_captions(PICTURES, sigma=SIGMA, empty=SINKS, seed=seed + 2),
    )


def _hidden(cells: Tensor) -> Edits:
    """Cells of each picture taken out of attention."""

    def edits(part: CaptionedShapes, start: int) -> list[Edit]:
        ids = caption_inputs(part)["input_ids"]
        return [BiasGroup(positions(at_cells(cells[start : start + len(part)], ids)), -math.inf)]

    return edits


def _sink_cells(n: int) -> Tensor:
    cells = torch.zeros(n, 16, dtype=torch.bool)
    cells[:, list(SINKS)] = True
    return cells


def _object_cells(scenes: CaptionedShapes) -> Tensor:
    return torch.zeros(len(scenes), 16, dtype=torch.bool).scatter_(1, scenes.cells, True)


def _mass(model: Any, scenes: CaptionedShapes, cells: Mapping[str, Tensor], *edits: Edit) -> dict[str, Tensor]:
    """`[n l h]` mean attention of the rows behind the picture on each of the cells of a set, one cell's share."""
    inputs = caption_inputs(scenes)
    ids = inputs["input_ids"]
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, 17:-1] = True  # behind <bos> and the picture; nothing is said after the last token
    groups = {name: at_cells(chosen, ids) for name, chosen in cells.items()}
    with steer(model, *edits):
        found = group_mass(model, inputs, groups, rows=rows)
    return {name: mass / cells[name].sum(1).clamp_min(1)[:, None, None] for name, mass in found.items()}


def tendency(run: Run, its: Subject) -> Measured:
    """In the model as it was trained: does an empty cell draw more attention than what is to be named?"""
    half = len(its.counterfactual) // 2
    first, second = its.counterfactual[:half], its.counterfactual[half:]

    def gap(scenes: CaptionedShapes, cell: int | None) -> tuple[Tensor, Tensor, int]:
        """Attention on a cell that is empty in every picture, and on object cells; the cell that gets most."""
        sets = {str(c): torch.eye(16, dtype=torch.bool)[c].expand(len(scenes), -1) for c in SINKS}
        mass = _mass(its.plain, scenes, {**sets, "objects": _object_cells(scenes)})
        means = {c: mass[str(c)].mean((1, 2)) for c in SINKS}
        chosen = max(means, key=lambda c: float(means[c].mean())) if cell is None else cell
        return means[chosen], mass["objects"].mean((1, 2)), chosen

    cell = gap(first, None)[2]
    empty, objects, _ = gap(second, cell)
    difference = empty - objects
    low, high = bootstrap_interval(difference.tolist(), seed=run.seed)
    return Measured(
        measured=(
            f"a row behind the picture gives {float(empty.mean()):.3f} to empty cell {cell} and "
            f"{float(objects.mean()):.3f} to a cell with a shape (difference {low:+.3f} to {high:+.3f})"
        ),
        control="the cell was chosen on the other half of the pictures",
        holds=float(difference.mean()) >= 0,
        margin=float(difference.mean()),
        interval=(low, high),
        values={"attention on the empty cell": float(empty.mean()), "on an object cell": float(objects.mean())},
    )


def massive(run: Run, its: Subject) -> tuple[Measured, Measured]:
    """Massive activations of the trained model, and whether the detector finds the implanted ones."""
    scenes = its.counterfactual[:CHUNK]
    inputs = caption_inputs(scenes)
    images = inputs["input_ids"] == its.plain.config.image_token_id
    width = its.plain.config.text_config.hidden_size
    bound = SHARE * math.sqrt(width)
    found = find_sinks(its.plain, inputs, threshold=bound, layers=LAYERS)
    visual = found.members & images[:, None]
    largest = float(found.values.nan_to_num(0).masked_fill(~images[:, None], 0).max())
    margin = largest - bound
    own = find_sinks(its.sunk, inputs, threshold=its.threshold, layers=LAYERS)
    truth = at_cells(_sink_cells(len(scenes)), inputs["input_ids"])
    seen = (own.members & images[:, None])[:, 1:]
    hits = (seen & truth[:, None]).sum()
    precision, recall = float(hits / seen.sum().clamp_min(1)), float(hits / (truth.sum() * seen.shape[1]))
    plain = own.values[:, 1:].masked_fill(~images[:, None], torch.nan)
    others = plain.masked_fill(truth[:, None], torch.nan).nan_to_num(0).max()
    sunk = plain.masked_fill(~truth[:, None], torch.nan).nan_to_num(math.inf).min()
    return Measured(
        measured=(
            f"largest max |x| / RMS(x) of an image token {largest:.1f} of a bound of sqrt({width}) = "
            f"{math.sqrt(width):.1f}; {int(visual.sum())} image tokens pass {bound:.1f}"
        ),
        control=f"with two sinks implanted, image tokens reach {float(own.values[:, 1:].nan_to_num(0).max()):.1f}",
        holds=margin >= 0,
        margin=margin,
        values={"largest max |x| / RMS(x)": largest},
    ), Measured(
        measured=(
            f"precision {precision:.3f}, recall {recall:.3f} over {len(scenes)} pictures and {seen.shape[1]} layers; "
            f"sinks have {float(sunk):.1f} or more, other image tokens {float(others):.1f} or less"
        ),
        control=f"on the model as it was trained it finds {int(visual.sum())}",
        holds=precision == 1 and recall == 1,
        values={"precision": precision, "recall": recall},
    )


def removable(run: Run, its: Subject, base: Scores) -> Measured:
    """Hide the sinks, and as many cells with shapes."""
    n = len(its.counterfactual)
    objects = random_cells(torch.full((n,), 2), run.seed, _object_cells(its.counterfactual))
    empty = random_cells(torch.full((n,), 2), run.seed, ~_object_cells(its.counterfactual) & ~_sink_cells(n))
    hidden = scored(its.sunk, its.counterfactual, _hidden(_sink_cells(n)))
    without = scored(its.sunk, its.counterfactual, _hidden(objects))
    blank = scored(its.sunk, its.counterfactual, _hidden(empty))
    said, gain, (low, _) = shown(hidden.accuracy - base.accuracy, run.seed)
    told, loss, (least, _) = shown(base.accuracy - without.accuracy, run.seed)
    other, _, _ = shown(blank.accuracy - base.accuracy, run.seed)
    mass = _mass(its.sunk, its.counterfactual[:CHUNK], {"sinks": _sink_cells(CHUNK), "others": ~_sink_cells(CHUNK)})
    ratio = float(mass["sinks"][:, 1:].mean() / mass["others"][:, 1:].mean())
    margins = {"no loss": (gain + 0.01, low + 0.01), "cost": (loss - COST, least - COST), "high": (ratio / 2 - 1, None)}
    tightest = min(margins, key=lambda name: margins[name][0])
    margin, edge = margins[tightest]
    return Measured(
        measured=(
            f"accuracy {100 * float(base.accuracy.mean()):.1f} %; with the two sinks hidden {said} points; a sink gets "
            f"{ratio:.1f} times the attention of another image token"
        ),
        control=(
            f"two random cells with shapes hidden: {told} points of loss; two random empty cells: {other}; the model "
            "before the sinks were implanted "
            f"{100 * float(scored(its.plain, its.counterfactual).accuracy.mean()):.1f} %"
        ),
        holds=margin >= 0,
        margin=margin,
        interval=None if edge is None else (min(edge, margin), max(margin, 2 * margin - edge)),
        values={"gain of hiding the sinks": gain, "loss of hiding objects": loss, "attention ratio": ratio},
    )


def focus(run: Run, its: Subject) -> Measured:
    """What VAR does to attention on the image tokens that are no sinks, and on text."""
    scenes = its.counterfactual[:CHUNK]
    cells = {"sinks": _sink_cells(CHUNK), "others": ~_sink_cells(CHUNK), "objects": _object_cells(scenes)}
    before, after = _mass(its.sunk, scenes, cells), _mass(its.sunk, scenes, cells, its.var())
    still = _mass(its.sunk, scenes, cells, its.var(transfer=0.0))
    idle = max(float((still[name] - before[name]).abs().max()) for name in cells)
    rise = (after["others"] - before["others"])[:, 1:].mean((1, 2)) * 14
    low, high = bootstrap_interval(rise.tolist(), seed=run.seed)
    sinks = [float(mass["sinks"][:, 1:].mean()) * 2 for mass in (before, after)]
    onto = float((after["objects"] - before["objects"])[:, 1:].mean()) * 4
    return Measured(
        measured=(
            f"attention on the other 14 image tokens rises by {float(rise.mean()):.3f} of a row ({low:.3f} to "
            f"{high:.3f}), {onto:+.3f} of it on the four shapes; on the sinks it goes from {sinks[0]:.3f} to "
            f"{sinks[1]:.3f}"
        ),
        control=f"with transfer 0 the largest change of any head is {idle:.0e}",
        holds=float(rise.mean()) >= 0,
        margin=float(rise.mean()),
        interval=(low, high),
        values={"rise on other image tokens": float(rise.mean()), "rise on shapes": onto},
    )


def _shuffled(its: Subject, seed: int) -> Edits:
    """VAR on as many heads of every row, drawn at random among the heads of the layer."""

    def edits(part: CaptionedShapes, start: int) -> list[Edit]:
        ids = caption_inputs(part)["input_ids"]
        image, sinks = ids == its.sunk.config.image_token_id, at_cells(_sink_cells(len(part)), ids)
        generator = torch.Generator().manual_seed(seed + start)

        def change(weights: Tensor, rows: Any) -> Tensor:
            behind = (rows.positions > 16)[None, None]
            chosen = image_centric_rows(weights, sinks, image) & behind
            order = torch.rand(chosen.shape, generator=generator).argsort(1)
            drawn = chosen.gather(1, order)
            new = redistribute_attention(
                weights, sinks, image, transfer=TRANSFER, non_sink_ratio=0.0, min_image_mass=0.0
            )
            return torch.where(drawn[..., None], new, weights)

        return [EditRows(change, heads="1-3.*")]

    return edits


def _spread(its: Subject) -> Edits:
    """The same share taken from the sinks and given to all other keys in proportion, in all heads."""

    def edits(part: CaptionedShapes, start: int) -> list[Edit]:
        del start
        sinks = positions(at_cells(_sink_cells(len(part)), caption_inputs(part)["input_ids"]))
        return [ScaleGroup(sinks, 1 - TRANSFER, heads="1-3.*", when=lambda step: _behind(step))]

    return edits


def _behind(step: Any) -> Tensor:
    return (torch.arange(step.past, step.total) > 16).expand(step.real.shape[0], -1)


def runs(run: Run, its: Subject) -> dict[str, Scores]:
    """Counterfactual answers of the model with sinks under VAR and its controls, and of the model without sinks."""
    variants: dict[str, Edits | None] = {
        "sinks implanted": None,
        "VAR": lambda part, start: [its.var()],
        "VAR, transfer 0.4": lambda part, start: [its.var(transfer=0.4)],
        "all heads": lambda part, start: [its.var(non_sink_ratio=0.0, min_image_mass=0.0)],
        "random heads": _shuffled(its, run.seed),
        "to all keys": _spread(its),
    }
    found = {}
    for name, edits in variants.items():
        run.log(name)
        found[name] = scored(its.sunk, its.counterfactual, edits)
    return {"no sinks": scored(its.plain, its.counterfactual), **found}


def centric(run: Run, found: Mapping[str, Scores]) -> Measured:
    """Heads that look at the image against random ones and all."""
    gains = {name: found["VAR"].accuracy - found[name].accuracy for name in ("random heads", "all heads")}
    told = {name: shown(gain, run.seed) for name, gain in gains.items()}
    worst = min(told, key=lambda name: told[name][1])
    said, _, _ = shown(found["VAR"].accuracy - found["sinks implanted"].accuracy, run.seed)
    return Measured(
        measured=f"VAR in image-centric heads changes accuracy by {said} points",
        control=", ".join(f"VAR minus {name}: {told[name][0]} points" for name in told),
        holds=told[worst][1] >= 0,
        margin=told[worst][1],
        interval=told[worst][2],
        values={f"VAR minus {name}": told[name][1] for name in told},
    )


def improves(run: Run, its: Subject, found: Mapping[str, Scores]) -> Measured:
    """Three tasks: questions, hallucinated shapes, seeing the shape that is there."""
    base, var = found["sinks implanted"], found["VAR"]
    before = polled(its.sunk, its.ordinary, run.seed)
    after = polled(its.sunk, its.ordinary, run.seed, lambda part, start: [its.var()])
    gains = {
        "questions answered right": after - before,
        "typical successors not said": base.typical - var.typical,
        "shapes named right": var.accuracy - base.accuracy,
    }
    told = {name: shown(gain, run.seed) for name, gain in gains.items()}
    worst = min(told, key=lambda name: told[name][1])
    ordinary = [scored(its.sunk, its.ordinary, edits) for edits in (None, lambda part, start: [its.var()])]
    cost, _, _ = shown(ordinary[1].accuracy - ordinary[0].accuracy, run.seed)
    return Measured(
        measured="; ".join(f"{name} {told[name][0]} points" for name in told),
        control=f"accuracy on ordinary pictures {cost} points",
        holds=told[worst][1] >= 0,
        margin=told[worst][1],
        interval=told[worst][2],
        values={name: told[name][1] for name in told},
    )


def restores(run: Run, found: Mapping[str, Scores]) -> Measured:
    """How much of what the sinks cost VAR gives back."""
    lost = found["no sinks"].accuracy - found["sinks implanted"].accuracy
    back = {name: found[name].accuracy - found["sinks implanted"].accuracy for name in found}
    margin = back["VAR"] - 0.5 * lost
    low, high = bootstrap_interval(margin.tolist(), seed=run.seed)
    share = {name: float(back[name].mean() / lost.mean()) for name in list(found)[2:]}
    cost, _, (least, _) = shown(lost, run.seed)
    mean = float(margin.mean()) if least > 0 else -1.0
    return Measured(
        measured=f"the sinks cost {cost} points; VAR gives back {100 * share['VAR']:.0f} % of them",
        control=", ".join(f"{name} {100 * value:.0f} %" for name, value in share.items() if name != "VAR"),
        holds=mean >= 0,
        margin=mean,
        interval=(low, high) if least > 0 else None,
        values={f"share given back, {name}": value for name, value in share.items()},
    )


def nothing(its: Subject) -> Measured:
    """The model as it was trained has no sink, so VAR must leave it alone and say so."""
    scenes = its.counterfactual[:CHUNK]
    inputs = caption_inputs(scenes)
    with torch.no_grad(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = its.plain(**inputs).logits
        with steer(its.plain, its.var()):
            same = bool(torch.equal(its.plain(**inputs).logits, before))
        plain = its.sunk(**inputs).logits
        with steer(its.sunk, its.var(transfer=0.0)):
            neutral = bool(torch.equal(its.sunk(**inputs).logits, plain))
    told = [str(one.message) for one in heard if "no image token passes" in str(one.message)]
    return Measured(
        measured=(
            f"logits the same bit for bit: {same}; transfer 0 on the model with sinks: {neutral}; "
            f"warned {len(told)} time: {told[0] if told else 'nothing'}"
        ),
        control="the same edit moves the model with sinks (row `focus`)",
        holds=same and neutral and len(told) == 1,
        values={"identical": float(same), "warnings": float(len(told))},
    )


def definition(its: Subject) -> Measured:
    """The edit against whole rows of weights changed by the pure rule, in double precision."""
    model = copy.deepcopy(its.sunk).double()
    scenes = its.counterfactual[:32]
    inputs = caption_inputs(scenes)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    ids = inputs["input_ids"]
    image = ids == model.config.image_token_id
    sites = [f"residual:{layer}" for layer in range(1, 4)]

    def change(weights: Tensor, rows: Any) -> Tensor:
        behind = (rows.positions > 16).expand(len(ids), -1)
        sinks = massive_values(seen[f"residual:{rows.call.layer}"]) > its.threshold  # as they are in this forward
        return redistribute_attention(weights, sinks, image, transfer=TRANSFER, rows=behind)

    with torch.no_grad():
        plain = model(**inputs).logits
        with steer(model, its.var()):
            found = model(**inputs).logits
        with steer(model, EditRows(change, heads="1-3.*")), record(model, sites) as seen:
            expected = model(**inputs).logits
    error = float((found - expected).norm() / expected.norm())
    moved = float((expected - plain).norm() / plain.norm())
    return Measured(
        measured=f"relative difference {error:.1e}",
        control=f"the edit itself moves the logits by {moved:.1e}",
        holds=error < 1e-5 and moved > 1e-3,
        values={"relative difference": error},
    )
