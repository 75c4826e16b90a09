"""Scale the attention that every query gives to the first token, head by head.

Method: headwise/steering/zero_tuning.py. The first token is a sink, so the lever is long.
"""

from collections.abc import Mapping

from headwise.papers import _zero_tuning_rows as rows_of
from headwise.papers.record import Claim, Paper
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, MARKERS, bars, figure, lines

PAPER = Paper(
    slug="zero-tuning",
    title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
    authors="Han, Yu, Tang, Rao, Du, Ungar",
    year=2025,
    venue="ICLR 2026",
    arxiv="2505.11739",
    repository="FeijiangHan/ZeroTuning",
    area="steering",
    modules=(
        "headwise.steering.zero_tuning",
        "headwise.steering.search",
        "headwise.tasks.prompted",
        "headwise.specimens.prompts",
        "headwise.papers._zero_tuning_rows",
    ),
    specimens=("tasks", "text", "backcopy", "backcopy-deep"),
    claims=(
        Claim(
            id="control-point",
            kind="claim",
            claim=(
                "In this paper, we uncover a surprising and elegant alternative: the semantically empty initial "
                "token is a powerful and underexplored control point for optimizing model behavior."
            ),
            criterion=(
                "in a model with a sink (mean weight of the first token above 0.3), the size of the change of "
                "loss per log gamma, averaged over heads, is at least 3 times that of scaling one random other "
                "token by the same factor; the 95 % interval over texts of the ratio excludes 3"
            ),
            control="one random other token per text (20 draws); a model without a sink, printed beside it",
        ),
        Claim(
            id="sharpens",
            kind="claim",
            claim=(
                "Through theoretical analysis, we show that tuning the initial token's attention sharpens or "
                "flattens the attention distribution over subsequent tokens, and its role as an attention sink "
                "amplifies this effect."
            ),
            paper_figure="differences of two weights change by (1 - gamma) a_0 / (1 + (gamma - 1) a_0) (derivation)",
            criterion=(
                "on every row of a trained model the differences between later weights follow the formula to "
                "1e-5, grow for gamma < 1 and shrink for gamma > 1, and over heads the relative change rises "
                "with the sink weight (rank correlation 0.99 or more)"
            ),
            control=(
                "the later weights renormalised among themselves do not change at all: sharpening is of their "
                "size, not of their shape"
            ),
            known=(
                "the formula holds on every row and no row changes in the wrong direction; but a head's mean change "
                "follows its mean weight on the first token with a rank correlation of 0.98 to 0.997, below the 0.99 "
                "that was asked for: the change of a row is not linear in its weight, so heads whose weight differs "
                "from row to row change places"
            ),
        ),
        Claim(
            id="better-token",
            kind="claim",
            claim=(
                "Empirically, we find that: (1) tuning its attention improves LLM performance more effectively "
                "than tuning other task-specific tokens;"
            ),
            criterion=(
                "with gamma chosen on a calibration split from the same grid, scaling the first token lowers "
                "the held-out loss more than scaling any single task-specific group (question, options, source "
                "span) does; the 95 % paired interval over prompts excludes 0 against the best of them"
            ),
            control="each task-specific group with its own best gamma; a random token with its own best gamma",
            known=(
                "these models answer by looking at one part of the prompt, and scaling that part is what helps; the "
                "first token, which gets 0.08 to 0.23 of a row here and is no strong sink, moves the loss by less than "
                "0.005 nats"
            ),
        ),
        Claim(
            id="layers",
            kind="claim",
            claim=(
                "(2) the effect follows a consistent trend across layers, with earlier layers having greater impact,"
            ),
            paper_figure="layers 1-10 and 11-21 matter more than 22-31 on Llama-3.1-8B (figure of the paper)",
            criterion=(
                "scaling the first token in one layer at a time, the largest change of held-out loss over the "
                "grid falls from layer to layer in every model with three or more layers (rank correlation with "
                "depth below -0.5 and the first half of the layers above the second)"
            ),
            control="the same for a random other token",
            known=(
                "with three or four layers and effects of 0.0001 to 0.004 nats their order changes with the "
                "seed of the prompts; the random token, which falls with depth as regularly, shows that depth alone "
                "would not have told the two apart"
            ),
        ),
        Claim(
            id="heads",
            kind="claim",
            claim=(
                "but varies across attention heads, with different heads showing distinct preferences in how "
                "they attend to this token."
            ),
            paper_figure="up-effective and down-effective heads (figure of the paper)",
            criterion=(
                "some heads lower the loss with gamma > 1 and raise it with gamma < 1, and others the reverse: "
                "at least one of each after Holm's correction over all heads (sign-flip test over prompts, "
                "0.05), on held-out prompts"
            ),
            control="the same count with the sign of each prompt's effect shuffled",
            known=(
                "the change of loss of a single head is below 0.001 nats on these models, whose heads park little on "
                "the first token: no head of either kind is left after the correction for all heads"
            ),
        ),
        Claim(
            id="improves",
            kind="claim",
            claim=(
                "Based on these findings, we propose ZeroTuning, a training-free approach that improves LLM "
                "performance by applying head-specific attention adjustments to this special token."
            ),
            paper_figure="Llama-3.1-8B, classification: 59.59 to 71.44 on average (a reading note of the paper)",
            criterion=(
                "gamma on the heads chosen on a calibration split raises held-out accuracy over the plain model "
                "and over one common gamma for all heads; both 95 % paired intervals over prompts exclude 0"
            ),
            control="as many layer-matched random heads with their own best gamma",
            known=(
                "on the prompts of the calibration split almost no head helps alone, so little is edited on the "
                "unseen prompts: the lever is short in models without a strong sink (row `control-point`)"
            ),
        ),
        Claim(
            id="tasks",
            kind="untestable",
            claim=(
                "Despite tuning only one token, ZeroTuning achieves higher performance on text classification, "
                "multiple-choice, and multi-turn conversation tasks across models such as Llama, Qwen, and "
                "DeepSeek."
            ),
            paper_figure="Llama-3.1-8B, Qwen-2-7B 55.10 to 68.19, DeepSeek-R1-14B 67.67 to 71.87 (a reading note)",
            criterion=(
                "needs instruction-tuned models of 7B and more and a judge of conversations; the row `improves` "
                "tests the gain on the tasks that the shipped models know"
            ),
        ),
        Claim(
            id="figures",
            kind="untestable",
            claim=(
                "For example, ZeroTuning improves Llama-3.1-8B by 11.71% on classification, 2.64% on QA tasks, "
                "and raises its multi-turn score from 7.804 to 7.966."
            ),
            paper_figure="11.71 %, 2.64 %, 7.804 to 7.966 (abstract)",
            criterion=(
                "needs Llama-3.1-8B, which cannot be run here; in the authors' notebook 153 of 500 plain SST-2 "
                "answers do not parse, and accuracy among those that do falls from 91.6 to 89.0 %"
            ),
        ),
        Claim(
            id="robust",
            kind="untestable",
            claim=(
                "The method is also robust to limited resources, few-shot settings, long contexts, "
                "quantization, decoding strategies, and prompt variations."
            ),
            criterion=(
                "few-shot prompts, prompt variations and long contexts mean nothing to models of this size; "
                "without them the sentence is not tested by its other parts"
            ),
        ),
        Claim(
            id="bias-form",
            kind="check",
            claim="Scaling the weight and renormalising is the same as adding log gamma to the logit.",
            criterion=(
                "on a trained model, edited outputs differ from materialised weights that were scaled and "
                "renormalised by less than 1e-5 relative; gamma 1 is bit-identical to the plain model"
            ),
        ),
        Claim(
            id="composition",
            kind="check",
            claim="Two factors in a row are their product.",
            criterion="gamma 2 then gamma 0.75 and gamma 1.5 give logits within 1e-5 relative",
        ),
        Claim(
            id="entropy",
            kind="check",
            claim="The entropy of a row follows from its new first weight: H = H_b(a_0') + (1 - a_0') H_tail.",
            criterion="holds to 1e-5 nats on every row of a trained model for gamma 0.3, 1.6 and 4",
        ),
    ),
)


def reproduce(run: Run) -> dict[str, Measured]:
    """Scale the first token of the shipped models, everywhere, by layer and by head, beside other tokens and heads."""
    run.log("making prompts")
    tasks, text, deep = rows_of.subjects(run)
    windows = text.beginnings()[:8]
    rows = {"control-point": rows_of.control_point(run, [tasks, text, deep])}
    rows["sharpens"], rows["entropy"] = rows_of.weights(text.model, windows)
    rows["bias-form"], rows["composition"] = rows_of.forms(text.model, windows)
    rows["better-token"], tokens = rows_of.better_token(run, [tasks, text])
    rows["layers"], layers = rows_of.layers(run, [tasks, text, deep])
    rows["heads"], heads = rows_of.heads(run, [tasks, text])
    rows["improves"] = rows_of.improves(run, [tasks, text])
    _draw(run, tokens, layers, heads)
    return rows


def _draw(
    run: Run,
    tokens: Mapping[str, Mapping[str, float]],
    layers: Mapping[str, list[float]],
    heads: Mapping[str, list[tuple[float, float]]],
) -> None:
    path = run.out / f"{PAPER.slug}-figure.png"
    with figure(path, 3) as (left, middle, right):
        kinds = {"first token": 0, "best other part": 1, "random token": 2}
        names = [task.replace("_", " ").replace(" ", "\n") for task in tokens]
        series = {kind: [list(gain.values())[at] for gain in tokens.values()] for kind, at in kinds.items()}
        bars(left, names, series, y="fall of held-out loss, nats", title="Which token to scale")
        left.tick_params(axis="x", labelsize=7)
        deepest = max(map(len, layers.values()))
        padded = {name: [*sizes, *[float("nan")] * (deepest - len(sizes))] for name, sizes in layers.items()}
        lines(middle, range(deepest), padded, x="layer", y="largest change of loss, nats", title="Which layer")
        middle.set_yscale("log")
        middle.set_xticks(range(deepest))
        for (name, pairs), colour, marker in zip(heads.items(), COLOURS, MARKERS, strict=False):
            right.scatter(*zip(*pairs, strict=True), color=colour, marker=marker, label=name)
        right.axhline(0, color="#a9aeb4", linewidth=0.8)
        right.axvline(0, color="#a9aeb4", linewidth=0.8)
        right.set(xlabel="change of loss at gamma 1.5", ylabel="at gamma 1 / 1.5", title="Which head")
        right.ticklabel_format(style="sci", scilimits=(-2, 2))
        right.legend()
    run.figures.append(path)
