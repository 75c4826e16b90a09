"""Lower the sinks that hurt, per head, and give their mass to the other tokens.

Method: headwise/steering/attention_calibration.py. Sinks are found for every head and input; heads are chosen once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from headwise.papers import _calibration_rows as rows_of
from headwise.papers._calibration_setup import tasks
from headwise.papers.record import Claim, Paper
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, MARKERS, bars, figure, lines

PAPER = Paper(
    slug="attention-calibration",
    title=(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration"
    ),
    authors="Yu, Wang et al.",
    year=2024,
    venue="ICML 2024",
    arxiv="2406.15765",
    repository="GATECH-EIC/ACT",
    area="steering",
    modules=(
        "headwise.steering.attention_calibration",
        "headwise.attend.received",
        "headwise.steering.search",
        "headwise.steering.calibration_heads",
        "headwise.papers._calibration_rows",
        "headwise.papers._calibration_setup",
    ),
    specimens=("tasks", "text", "backcopy-deep", "vision-language"),
    changed=(
        "a trial on 16 other prompts a task showed that in texts of 23 to 64 tokens shuffled rows have tokens "
        "above 0.1 as well, so pairs of a head and a token above both thresholds are counted instead of texts; "
        "tasks that are answered always or at chance (addition, multiple choice) were left out, and needles made "
        "longer; prose has fewer and shorter prompts, for time; needles and prose count whole answers; weights-"
        "form compares outputs of heads; after that trial the intervals of later-sinks and improves were made "
        "those of the numbers that decide"
    ),
    claims=(
        Claim(
            id="later-sinks",
            kind="claim",
            claim=(
                "Based on these visualizations, to the best of our knowledge, we are the first to discover that (1) "
                "attention sinks occur not only at the start of sequences but also within later tokens of the input,"
            ),
            criterion=(
                "with symbols, with prose and with pictures, at least half of the texts hold a token behind the "
                "first to which some head gives a mean weight above 0.1 and above 5 / N (both thresholds of the "
                "authors) over 16 or more rows that see it; and a text has more pairs of a head and such a token "
                "than once the weights of every row are shuffled among its keys, the 95 % paired interval over texts "
                "of the difference excludes 0"
            ),
            control="the same maps with the weights of every row on random keys of that row",
        ),
        Claim(
            id="sinks-hurt",
            kind="claim",
            claim="and (2) not all attention sinks have a positive impact on the achievable accuracy of LLMs.",
            criterion=(
                "damping the sinks of one head at a time by 0.4, the loss of held-out answers falls for at least one "
                "head and rises for at least one, each after Holm's correction over all heads and tasks (sign-flip "
                "test over prompts, 0.05)"
            ),
            control=(
                "the same count with the sign of each prompt's change shuffled; as many random other tokens of the "
                "same heads damped by the same factor"
            ),
        ),
        Claim(
            id="input-adaptive",
            kind="claim",
            claim=(
                "Building upon our findings, we propose a training-free Attention Calibration Technique (ACT) that "
                "automatically optimizes the attention distributions on the fly during inference in an "
                "input-adaptive manner."
            ),
            criterion=(
                "under the edit no weight of a model changes by a bit, and in every task whose texts are of one "
                "length and have sinks, more than half of the pairs of texts have other sinks behind the first token"
            ),
            control="the same texts read twice have the same sinks",
        ),
        Claim(
            id="improves",
            kind="claim",
            claim=(
                "Extensive experiments validate that ACT consistently enhances the accuracy of various LLMs across "
                "different applications."
            ),
            paper_figure="the authors' log of one calibration run: 0.6211 on average over nine classification sets",
            criterion=(
                "calibrating the heads that each raise accuracy on a calibration split raises held-out accuracy by "
                "0.001 or more in every task and on average over the plain model and over random sets of as many "
                "heads; the 95 % interval of the average over prompts excludes it"
            ),
            control=(
                "20 layer-matched random sets of as many heads and all heads, on the same prompts; the gain on the "
                "prompts of the search, which selection alone makes positive"
            ),
            known=(
                "the gain is in captions (+0.08 to +0.12 in three seeds, above random sets); needles gain 0.01 to "
                "0.05, in prose, backcopy and questions no or few heads help on the calibration prompts, and what "
                "helped there costs up to 0.11 on unseen ones"
            ),
        ),
        Claim(
            id="figures",
            kind="untestable",
            claim=(
                "Specifically, ACT achieves an average improvement of up to 7.30% in accuracy across different "
                "datasets when applied to Llama-30B."
            ),
            paper_figure="7.30 % on average, Llama-30B (abstract)",
            criterion=(
                "needs Llama-30B, which cannot be run here; `read_calibration_heads` reads the head sets that the "
                "authors published for Llama-2-7B and Mistral-7B, with which the same class runs there"
            ),
        ),
        Claim(
            id="weights-form",
            kind="check",
            claim="The edit gives what calibrated weights give, with the first token untouched and rows that sum to 1.",
            criterion=(
                "in every layer of a trained model and with both kinds of statistics, on 200 tokens, head outputs "
                "under the edit differ from those under maps that were formed, calibrated and put in their place by "
                "less than 1e-5 relative (double precision); beta 1 is bit-identical to the plain model"
            ),
        ),
        Claim(
            id="cache",
            kind="check",
            claim="Tokens generated with a cache are calibrated as one forward over the whole text calibrates them.",
            criterion=(
                "with running statistics the logits of 12 tokens generated in a batch padded on the left differ from "
                "those of one forward over each whole text by less than 1e-4"
            ),
            control="the plain model's own difference",
            known=(
                "in seed 2 eight of 12,100 sink decisions are ties: a head with weight 1 on one key gives it a mean of "
                "exactly 1/10, the threshold, after ten rows, and float32 sums in another order decide it otherwise; "
                "with the threshold at 0.10001 or 0.09999 the difference is 1.6e-5, in float64 4e-15"
            ),
        ),
    ),
)


def reproduce(run: Run) -> dict[str, Measured]:
    """Find the sinks of the shipped models on five tasks, damp them head by head, and in the heads where that helps."""
    run.log("making prompts")
    subjects = tasks(run)
    prose = next(task for task in subjects if task.name == "prose")
    long = prose.calibration.input_ids[:4].flatten()[None, : rows_of.WINDOW]
    rows = {}
    run.log("finding sinks")
    rows["later-sinks"], views = rows_of.later_sinks(run, subjects)
    rows["input-adaptive"] = rows_of.adaptive(run, subjects, views)
    rows["sinks-hurt"], moved = rows_of.sinks_hurt(run, subjects)
    rows["improves"], found = rows_of.improves(run, subjects)
    rows["weights-form"] = rows_of.forms(long)
    rows["cache"] = rows_of.decoding(long[:, :60])
    _draw(run, views, moved, found)
    return rows


def _draw(run: Run, views: Sequence[Any], moved: Mapping[str, Mapping[Any, Any]], found: Mapping[str, Any]) -> None:
    path = run.out / f"{PAPER.slug}-figure.png"
    with figure(path, 3, width=5.2) as (left, middle, right):
        parts = 8
        places = [(i + 0.5) / parts for i in range(parts)]
        along = {view.task: view.along(parts) for view in views}
        lines(left, places, along, x="place in the text", y="share of texts", title="Sinks behind the first token")
        left.set_ylim(-0.03, 1.03)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=8)
        for number, table in enumerate(moved.values()):
            changes = sorted(table.values(), key=lambda change: float(change.mean()))
            means = [float(change.mean()) for change in changes]
            bounds = [2 * float(change.std()) / len(change) ** 0.5 for change in changes]
            sure = [abs(at) > bound for at, bound in zip(means, bounds, strict=True)]
            ranks = [i / max(1, len(means) - 1) for i in range(len(means))]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            faces = [colour if certain else "none" for certain in sure]
            middle.scatter(ranks, means, s=14, facecolors=faces, edgecolors=colour, linewidths=0.7, marker=marker)
        middle.axhline(0, color="#a9aeb4", linewidth=0.8)
        middle.set_yscale("symlog", linthresh=1e-3)
        middle.set(
            xlabel="heads of a task, in order; filled beyond two standard errors",
            ylabel="change of loss, nats",
            title="Sinks of one head damped",
        )
        names = [name.replace(" ", "\n") for name in found]
        series = {
            "chosen heads": [one.gain for one in found.values()],
            "random sets": [float(one.random.mean()) if len(one.random) else 0.0 for one in found.values()],
            "all heads": [float(one.all_heads.mean()) for one in found.values()],
        }
        error = {"chosen heads": [one.error for one in found.values()]}
        bars(right, names, series, error=error, y="gain of held-out accuracy", title="Calibrated heads")
        right.tick_params(axis="x", labelsize=7)
        right.axhline(0, color="#a9aeb4", linewidth=0.8)
    run.figures.append(path)
