"""Pictures and rows of imbalanced attention; the record of the paper is in imbalanced_attention.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.attend.edit import Edit
from headwise.attend.groups import image_tokens, positions
from headwise.heads.masses import group_mass
from headwise.heads.vision_tokens import informed_tokens
from headwise.hf.session import steer
from headwise.papers._picture_runs import (
    CHUNK,
    Edits,
    Scores,
    at_cells,
    caption_inputs,
    chunks,
    random_cells,
    scored,
    shown,
)
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, rank_correlation
from headwise.papers.verdicts import Measured
from headwise.specimens.vision_language import (
    EOS,
    ID,
    IMAGE,
    PAD,
    SIGMA,
    WORDS,
    vision_language_inputs,
    vision_language_model,
)
from headwise.steering.imbalanced_attention import ImageTokenBoost, ImbalancedAttention, sensitivity_scale
from headwise.tasks.captions import SHAPE_WORDS, CaptionedShapes, shapes_captions
from headwise.tasks.hallucination import Chair, chair

PICTURES, CALIBRATION, PLACEBOS = 1024, 256, 3
LAYERS = slice(1, None)  # 1 to 3 of 4; the paper's 2 to 31 of 32
TOWER: dict[str, Any] = {
    "local_layer": 0,
    "summary_layer": -1,
}  # the last layer whose output is used, as the paper's -2 is there
LOCAL, SUMMARY = 0.7, 0.3
WORDS_SAID = 8  # tokens of a caption: four shapes, three commas, the end
LEAD = 0.02  # by how much the informed tokens must beat random ones


@dataclass
class Subject:
    """The trained model, unseen pictures, the tokens that its tower singles out, and factors of its heads."""

    model: Any
    counterfactual: CaptionedShapes
    ordinary: CaptionedShapes
    scale: Tensor
    local: Tensor  # [n, 16] of the counterfactual pictures
    summary: Tensor

    def edit(self, **options: Any) -> ImbalancedAttention:
        chosen: dict[str, Any] = {"local": LOCAL, "summary": SUMMARY, "layers": LAYERS, "queries": "text", **TOWER}
        return ImbalancedAttention(**{**chosen, **options})

    @property
    def full(self) -> ImbalancedAttention:
        """The method: informed tokens, heads by their sensitivity."""
        return self.edit(head_scale=self.scale)


def subject(run: Run) -> Subject:
    model = vision_language_model(run.seed)
    seed = 60_000 + 10 * run.seed
    scenes = shapes_captions(PICTURES, sigma=SIGMA, counterfactual=True, seed=seed)
    prompts = vision_language_inputs(shapes_captions(CALIBRATION, sigma=SIGMA, seed=seed + 2))
    mass = group_mass(model, prompts, {"image": image_tokens()})["image"]  # of the last row of the prompt
    found = [informed_tokens(model, caption_inputs(part), **TOWER) for _, part in chunks(scenes)]
    ids = caption_inputs(scenes)["input_ids"]
    local, summary = (
        torch.cat([getattr(one, name) for one in found])[ids == IMAGE].view(len(scenes), 16)
        for name in ("local", "summary")
    )
    return Subject(
        model,
        scenes,
        shapes_captions(PICTURES, sigma=SIGMA, seed=seed + 1),
        sensitivity_scale(mass),
        local,
        summary,
    )


def _object_cells(scenes: CaptionedShapes) -> Tensor:
    return torch.zeros(len(scenes), 16, dtype=torch.bool).scatter_(1, scenes.cells, True)


def _random_tokens(its: Subject, seed: int, **options: Any) -> Edits:
    """As many random local and summary tokens of every counterfactual picture."""
    local = random_cells(its.local.sum(1), seed)
    summary = random_cells(its.summary.sum(1), seed + 1, ~local)

    def edits(part: CaptionedShapes, start: int) -> list[Edit]:
        ids = caption_inputs(part)["input_ids"]
        groups = [positions(at_cells(cells[start : start + len(part)], ids)) for cells in (local, summary)]
        return [its.edit(local_group=groups[0], summary_group=groups[1], **options)]

    return edits


def runs(run: Run, its: Subject) -> dict[str, Scores]:
    """Counterfactual answers under the method, its parts, and controls; random tokens are a mean over three draws."""
    generator = torch.Generator().manual_seed(run.seed)
    shuffled = [
        torch.stack([row[torch.randperm(len(row), generator=generator)] for row in its.scale]) for _ in range(PLACEBOS)
    ]
    even = its.scale.mean(1, keepdim=True).expand_as(its.scale).contiguous()
    variants: dict[str, list[Edits | None]] = {
        "plain": [None],
        "full": [lambda part, start: [its.full]],
        "informed tokens, all heads": [lambda part, start: [its.edit()]],
        "random tokens, all heads": [_random_tokens(its, run.seed + 100 * i) for i in range(PLACEBOS)],
        "all tokens, all heads": [lambda part, start: [ImageTokenBoost(LOCAL, layers=LAYERS, queries="text")]],
        "even heads": [lambda part, start: [its.edit(head_scale=even)]],
        "random heads": [lambda part, start, scale=scale: [its.edit(head_scale=scale)] for scale in shuffled],
        "insensitive heads": [lambda part, start: [its.edit(head_scale=1 - its.scale)]],
        "bias mode": [lambda part, start: [its.edit(head_scale=its.scale, mode="bias")]],
    }
    found = {}
    for name, draws in variants.items():
        run.log(name)
        some = [scored(its.model, its.counterfactual, edits) for edits in draws]
        means = {what: torch.stack([getattr(one, what) for one in some]).mean(0) for what in vars(some[0])}
        found[name] = Scores(**means)
    return found


@dataclass
class Written:
    """Captions that the model wrote itself: `[n, t]` ids with the prompt, texts, and rows that say a shape.

    rows: `[n, t]` rows whose next token is a shape; wrong: those whose shape is not in the picture; place: which
    shape of the caption it is, from 0.
    """

    ids: Tensor
    texts: list[str]
    rows: Tensor
    wrong: Tensor
    place: Tensor


def written(its: Subject, *edits: Edit) -> Written:
    """Greedy captions of the counterfactual pictures under edits as generation applies them."""
    parts = []
    for _, part in chunks(its.counterfactual):
        inputs = vision_language_inputs(part)
        with torch.no_grad(), steer(its.model, *edits):
            made = its.model.generate(**inputs, max_new_tokens=WORDS_SAID, do_sample=False)
        start = inputs["input_ids"].shape[1]
        parts.append(torch.nn.functional.pad(made, (0, start + WORDS_SAID - made.shape[1]), value=PAD))
    ids, start = torch.cat(parts), parts[0].shape[1] - WORDS_SAID
    new = ids[:, start:]
    ended = (new == EOS).cumsum(1) > 0
    texts = [" ".join(WORDS[i] for i in row[~over].tolist() if i != PAD) for row, over in zip(new, ended, strict=True)]
    first = ID[SHAPE_WORDS[0]]
    shape = (new - first).clamp(0, len(SHAPE_WORDS) - 1)
    names = (new >= first) & (new < first + len(SHAPE_WORDS)) & ~ended
    absent = names & ~its.counterfactual.present.gather(1, shape)
    pad = (start - 1, 1)  # the row that says a token is the one before it

    def over_rows(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, pad)

    place = over_rows(names.int().cumsum(1) - 1)
    return Written(ids, texts, over_rows(names), over_rows(absent), place)


def image_mass(its: Subject, said: Written, rows: Tensor, *edits: Edit) -> Tensor:
    """`[n l]` attention on the picture from rows of each caption, mean over heads; nan where a caption has none."""
    found = []
    for start in range(0, len(said.ids), CHUNK):
        at = slice(start, start + CHUNK)
        inputs = {"input_ids": said.ids[at], "pixel_values": its.counterfactual[at].pixel_values}
        with steer(its.model, *edits):
            found.append(group_mass(its.model, inputs, {"image": image_tokens()}, rows=rows[at])["image"].mean(-1))
    return torch.cat(found)


def hallucinates(run: Run, its: Subject, said: Written) -> tuple[Measured, Chair]:
    measured = chair(said.texts, its.counterfactual.objects())
    wrong = said.wrong.any(1).float()
    low, high = bootstrap_interval(wrong.tolist(), seed=run.seed)
    usual = chair(_ordinary_captions(its), its.ordinary.objects())
    return Measured(
        measured=(
            f"{100 * measured.chair_s:.1f} % of captions name a shape that is not there ({100 * low:.1f} to "
            f"{100 * high:.1f}); {100 * measured.chair_i:.1f} % of the shapes named are not there"
        ),
        control=f"on ordinary pictures {100 * usual.chair_s:.1f} % and {100 * usual.chair_i:.1f} %",
        holds=measured.chair_s >= 0.1,
        margin=measured.chair_s - 0.1,
        interval=(low - 0.1, high - 0.1),
        values={"CHAIR_s": measured.chair_s, "CHAIR_i": measured.chair_i, "CHAIR_i, ordinary": usual.chair_i},
    ), measured


def _ordinary_captions(its: Subject, *edits: Edit) -> list[str]:
    other = Subject(its.model, its.ordinary, its.ordinary, its.scale, its.local, its.summary)
    return written(other, *edits).texts


def degrades(run: Run, its: Subject, said: Written) -> tuple[Measured, dict[str, list[float]]]:
    """Attention on the picture layer by layer, from rows that say a wrong and a right shape."""
    right = said.rows & ~said.wrong
    masses = {"wrong shapes": image_mass(its, said, said.wrong), "right shapes": image_mass(its, said, right)}
    every = image_mass(its, said, said.rows)
    layers = every.shape[1]
    means = {name: mass.nanmean(0).tolist() for name, mass in {"all shapes": every, **masses}.items()}
    falls = every[:, : layers // 2].mean(1) - every[:, layers // 2 :].mean(1)
    deeper = slice(layers // 2, None)
    # Captions that hold both kinds: the two are compared within a picture.
    gap = {
        name: (masses["right shapes"] - masses["wrong shapes"])[:, part].mean(1)
        for name, part in {"deeper": deeper, "earlier": slice(layers // 2)}.items()
    }
    gap = {name: values[~values.isnan()] for name, values in gap.items()}
    parts = {"fall with depth": falls, "gap in the deeper half": gap["deeper"]}
    told = {name: shown(value, run.seed) for name, value in parts.items()}
    worst = min(told, key=lambda name: told[name][1])
    early, _, _ = shown(gap["earlier"], run.seed)
    depth = rank_correlation(list(range(layers)), means["all shapes"])
    return Measured(
        measured=(
            f"attention on the picture by layer {', '.join(f'{x:.2f}' for x in means['all shapes'])}; it falls from "
            f"the earlier to the deeper half by {told['fall with depth'][0]} points of a row; in the deeper half right "
            f"shapes get {told['gap in the deeper half'][0]} points more than wrong ones ({len(gap['deeper'])} "
            "captions with both)"
        ),
        control=f"the same gap in the earlier half: {early} points; rank correlation with depth {depth:+.2f}",
        holds=told[worst][1] >= 0,
        margin=told[worst][1],
        interval=told[worst][2],
        values={name: told[name][1] for name in told},
    ), means


def maintains(run: Run, its: Subject, said: Written) -> tuple[Measured, dict[str, list[float]]]:
    """Attention on the picture at the first to the fourth shape, plain and under the method, on the same captions."""
    edited = slice(1, None)
    series: dict[str, list[float]] = {"plain": [], "under the method": []}
    rises = []
    for place in range(4):
        rows = said.rows & (said.place == place)
        before = image_mass(its, said, rows)[:, edited].mean(1)
        after = image_mass(its, said, rows, its.full)[:, edited].mean(1)
        for name, mass in (("plain", before), ("under the method", after)):
            series[name].append(float(mass.nanmean()))
        rise = after - before
        rises.append(rise[~rise.isnan()])
    told = [shown(rise, run.seed) for rise in rises]
    worst = min(told, key=lambda one: one[1])
    lasts = series["under the method"][0] - series["under the method"][-1]
    loses = series["plain"][0] - series["plain"][-1]
    return Measured(
        measured=(
            "attention on the picture rises by "
            + ", ".join(one[0] for one in told)
            + " points of a row at the first to fourth shape"
        ),
        control=f"from the first to the fourth shape it falls by {loses:.3f} in the plain model, {lasts:.3f} under it",
        holds=worst[1] >= 0,
        margin=worst[1],
        interval=worst[2],
        values={f"rise at shape {i + 1}": one[1] for i, one in enumerate(told)},
    ), series


def selection(run: Run, its: Subject, found: Mapping[str, Scores]) -> Measured:
    """Informed tokens against random ones: where they lie, and what they do."""
    chosen = its.local | its.summary
    objects = _object_cells(its.counterfactual)
    share = (chosen & objects).sum(1) / chosen.sum(1).clamp_min(1)
    where, excess, (low, high) = shown(share - 0.25, run.seed)
    gain = found["random tokens, all heads"].typical - found["informed tokens, all heads"].typical - LEAD
    told, lead, span = shown(gain + LEAD, run.seed)
    margins = [(excess, (low, high)), (lead - LEAD, (span[0] - LEAD, span[1] - LEAD))]
    margin, interval = min(margins, key=lambda one: one[0])
    every, _, _ = shown(found["plain"].typical - found["all tokens, all heads"].typical, run.seed)
    base, _, _ = shown(found["plain"].typical - found["informed tokens, all heads"].typical, run.seed)
    return Measured(
        measured=(
            f"{float(its.local.sum(1).float().mean()):.1f} local and {float(its.summary.sum(1).float().mean()):.2f} "
            f"summary tokens a picture; {100 * float(share.mean()):.1f} % of them are cells with shapes ({where} "
            f"points above chance); raising them lowers typical successors by {base} points, {told} points more than "
            "random tokens do"
        ),
        control=f"random tokens of the same number (three draws); all image tokens lower them by {every} points",
        holds=margin >= 0,
        margin=margin,
        interval=interval,
        values={"share on shapes": float(share.mean()), "lead over random tokens": lead},
    )


def modulation(run: Run, found: Mapping[str, Scores]) -> Measured:
    """Factors by sensitivity against the same factors on other heads, and even ones of the same mean."""
    names = ("random heads", "even heads", "insensitive heads")
    told = {name: shown(found[name].typical - found["full"].typical, run.seed) for name in names}
    worst = min(("random heads", "even heads"), key=lambda name: told[name][1])
    return Measured(
        measured=", ".join(f"{told[name][0]} points fewer typical successors than with {name}" for name in names[:2]),
        control=f"against insensitive heads {told['insensitive heads'][0]} points",
        holds=told[worst][1] >= 0,
        margin=told[worst][1],
        interval=told[worst][2],
        values={f"lead over {name}": told[name][1] for name in names},
    )


def grounding(run: Run, its: Subject, found: Mapping[str, Scores], plain: Chair) -> Measured:
    """The whole method: fewer typical successors, more right shapes, nothing lost on ordinary pictures."""
    base, full = found["plain"], found["full"]
    gains = {"typical successors": base.typical - full.typical, "right shapes": full.accuracy - base.accuracy}
    before = scored(its.model, its.ordinary)
    after = scored(its.model, its.ordinary, lambda part, start: [its.full])
    kept = {
        "ordinary accuracy": after.accuracy - before.accuracy + 0.02,
        "first shape": full.first - base.first + 0.02,
    }
    told = {name: shown(value, run.seed) for name, value in {**gains, **kept}.items()}
    worst = min(told, key=lambda name: told[name][1])
    said = written(its, its.edit(head_scale=its.scale, queries="last"))
    now = chair(said.texts, its.counterfactual.objects())
    fall = 1 - now.chair_i / plain.chair_i if plain.chair_i else 0.0
    others = ", ".join(
        f"{name} {100 * float(scores.typical.mean()):.1f}/{100 * float(scores.accuracy.mean()):.1f}"
        for name, scores in found.items()
    )
    return Measured(
        measured=(
            f"typical successors fall by {told['typical successors'][0]} points, right shapes rise by "
            f"{told['right shapes'][0]}; ordinary accuracy {shown(kept['ordinary accuracy'] - 0.02, run.seed)[0]}, "
            f"first shape {shown(kept['first shape'] - 0.02, run.seed)[0]}; written captions: CHAIR_i "
            f"{100 * plain.chair_i:.1f} to {100 * now.chair_i:.1f} % ({100 * fall:.0f} % less), recall "
            f"{100 * plain.recall:.1f} to {100 * now.recall:.1f} %, {plain.length:.2f} to {now.length:.2f} words"
        ),
        control=f"typical/right, %: {others}",
        holds=told[worst][1] >= 0,
        margin=told[worst][1],
        interval=told[worst][2],
        values={
            **{name: told[name][1] for name in gains},
            "fall of CHAIR_i": fall,
            "recall": now.recall - plain.recall,
        },
    )


def neutral(its: Subject) -> Measured:
    inputs = caption_inputs(its.counterfactual[:CHUNK])
    with torch.no_grad():
        plain = its.model(**inputs).logits
        same = []
        for edit in (its.edit(local=0.0, summary=0.0), ImageTokenBoost(0.0), its.edit(head_scale=its.scale * 0)):
            with steer(its.model, edit):
                same.append(float((its.model(**inputs).logits - plain).abs().max()))
        words = {"input_ids": vision_language_inputs(None, "describe : ring ,")["input_ids"]}
        alone = its.model(**words).logits
        with steer(its.model, its.full):
            text = bool(torch.equal(its.model(**words).logits, alone))
    return Measured(
        measured=(
            f"largest difference {max(same[:2]):.0e}, with factors of 0 {same[2]:.0e}; text alone is the same: {text}"
        ),
        control="the edit itself moves answers (row `grounding`)",
        holds=max(same[:2]) == 0 and same[2] < 1e-4 and text,
        values={"largest difference": max(same[:2])},
    )


def odds(its: Subject) -> Measured:
    """In mode "bias" the mass of all image tokens follows m e^c / (1 - m + m e^c), head by head in one layer."""
    inputs = caption_inputs(its.counterfactual[:CHUNK])
    groups = {"image": image_tokens()}
    error, c = 0.0, 0.7
    for layer in range(1, 4):
        before = group_mass(its.model, inputs, groups)["image"][:, layer]
        edit = ImageTokenBoost(c, mode="bias", layers=[layer])
        with steer(its.model, edit):
            after = group_mass(its.model, inputs, groups)["image"][:, layer]
        raised = before * torch.tensor(c).exp()
        error = max(error, float((after - raised / (1 - before + raised)).abs().max()))
    return Measured(
        measured=f"largest difference {error:.1e} over {CHUNK} pictures, three layers and eight heads",
        holds=error < 1e-5,
        values={"largest difference": error},
    )
