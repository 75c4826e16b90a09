"""Attention sinks are heads at rest: active on their domain, parked on a token without value elsewhere.

Method: headwise/heads/dormant.py and the Bigram-Backcopy task, headwise/tasks/bigram_backcopy.py.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="active-dormant-heads",
    title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
    authors="Guo, Pai, Bai, Jiao, Jordan, Mei",
    year=2024,
    venue="NeurIPS 2024 workshop M3L",
    arxiv="2410.13835",
    repository="GuoTianYu2000/Active-Dormant-Attention",
    area="heads",
    modules=(
        "headwise.heads.dormant",
        "headwise.models.backcopy_decoder",
        "headwise.attention.relu",
        "headwise.tasks.bigram_backcopy",
        "headwise.papers._active_dormant_setup",
        "headwise.papers._active_dormant_rows",
    ),
    specimens=("text",),
    claims=(
        Claim(
            id="observed",
            kind="untestable",
            claim=(
                "Practitioners have consistently observed three puzzling phenomena in transformer-based large "
                "language models (LLMs): attention sinks, value-state drains, and residual-state peaks, "
                "collectively referred to as extreme-token phenomena."
            ),
            criterion=(
                "a statement about what others saw in large models; the row `characterised` measures the three "
                "phenomena in our own language model"
            ),
        ),
        Claim(
            id="characterised",
            kind="claim",
            claim=(
                'These phenomena are characterized by certain so-called "sink tokens" receiving '
                "disproportionately high attention weights, exhibiting significantly smaller value states, and "
                "having much larger residual-state norms than those of other tokens."
            ),
            paper_figure="Llama-2-7B head 16.25 and others (figures of the paper)",
            criterion=(
                "in the text model, on held-out text: the first token receives at least 5 times the mean weight "
                "of a token in at least a quarter of the heads; in those heads its value norm is at most half "
                "the mean of the others (median over heads); and after at least one layer its residual norm is "
                "at least twice the mean of the others"
            ),
            control="the same three numbers for the second token of the text, and for a model with random weights",
        ),
        Claim(
            id="challenges",
            kind="untestable",
            claim=(
                "These extreme tokens give rise to various challenges in LLM inference, quantization, and "
                "interpretability."
            ),
            criterion="motivation drawn from other work on large models; the paper measures none of it",
        ),
        Claim(
            id="elucidate",
            kind="untestable",
            claim="We elucidate the mechanisms behind extreme-token phenomena.",
            criterion="a summary; the rows after it are what it rests on",
        ),
        Claim(
            id="simple-models",
            kind="claim",
            claim=(
                "First, we show that these phenomena arise in very simple architectures -- transformers with "
                "one to three layers -- trained on a toy model, the Bigram-Backcopy (BB) task."
            ),
            paper_figure="1 and 3 layers, one head, d = 256 (official BBM scripts)",
            criterion=(
                "after training on Bigram-Backcopy: with one layer and one head, rows that are no trigger give "
                "BOS at least 0.5 and its value norm is at most half the mean of the others; with three layers, "
                "some head does the same and the residual norm of BOS is at least twice the mean of the others "
                "after some layer"
            ),
            control="the same models before training",
            known=(
                "the sink and the drained value grow in every seed, but the residual norm of BOS reaches 1.07 to 1.58 "
                "of the others within 1,200 steps at width 64 (the paper: 10,000 steps and more at width 256), and "
                "the sink of the three-layer model stays below 0.5 in two seeds of three"
            ),
        ),
        Claim(
            id="active-dormant",
            kind="claim",
            claim=(
                "In this setting, we identify an active-dormant mechanism, where attention heads become sinks "
                "for specific input domains while remaining non-sinks for others."
            ),
            paper_figure="trigger rows attend to the previous token, others to BOS (figure of the paper)",
            criterion=(
                "one layer: rows that are no trigger give BOS at least 0.5, trigger rows at most 0.05 and at "
                "least 0.6 to the previous token; removing the head changes the excess loss of the first by "
                "less than 0.05 nats and raises the loss of the second by more than 1 nat"
            ),
            control="the same split with the trigger mark moved to random other tokens of the same text",
        ),
        Claim(
            id="mutual-reinforcement",
            kind="claim",
            claim=(
                "Our theoretical analysis of the training dynamics reveals that these phenomena are driven by a "
                "mutual reinforcement mechanism."
            ),
            paper_figure="logits to BOS grow logarithmically in time while its value shrinks (theorem; recalled)",
            criterion=(
                "along training, after trigger rows are solved (loss below 0.1 nats), sink weight and value "
                "norm of BOS move against each other (rank correlation over checkpoints -0.9 or less); and each "
                "needs the other: with the value of BOS held at the mean norm of the others the sink ends at "
                "most half as large, and with BOS's weight held at its share of an even row the value norm ends "
                "at least half the mean of the others"
            ),
            control="the unconstrained run of the same seed and steps",
            known=(
                "at this size the sink does not need the drain: with the value of BOS held it ends at 0.75 to 0.89, "
                "no lower than in the free run; the other half holds (the value stays when the weight is held), and "
                "the two move against each other with rank correlations of -0.70 to -0.94"
            ),
        ),
        Claim(
            id="mitigation",
            kind="claim",
            claim=(
                "Building on these insights, we propose strategies to mitigate extreme-token phenomena during "
                "pretraining, including replacing softmax with ReLU and Adam with SGD."
            ),
            paper_figure=(
                "ReLU: no sink and no drain; SGD: the residual peak is gone in three layers (figures of the paper)"
            ),
            criterion=(
                "at a trigger loss within 0.1 nats of the softmax model: with ReLU weights, BOS receives less "
                "than 0.1 of a row's weight on rows that are no trigger, and its value norm is above 0.6 of the "
                "mean of the others; with three layers and SGD, the largest residual ratio of BOS exceeds 1 by "
                "at most half as much as with AdamW"
            ),
            control="the softmax and AdamW models of the same seed, steps and size",
            known=(
                "ReLU weights leave no sink in any seed, and SGD no residual peak, but the value of BOS still falls to "
                "0.48 to 0.59 of the others under ReLU, just below the limit of 0.6"
            ),
        ),
        Claim(
            id="language-models",
            kind="claim",
            claim=(
                "Next, we extend our analysis to pretrained LLMs, including Llama and OLMo, showing that many "
                "attention heads exhibit a similar active-dormant mechanism as in the BB task,"
            ),
            paper_figure="Llama-2-7B head 16.25: dormant on Wikipedia, active on GitHub (figure of the paper)",
            criterion=(
                "in the text model at least a tenth of the heads are dormant on one kind of text (mean weight "
                "of the first token above 0.5 on held-out prose or code or repeats) and active on another "
                "(below half of that), and removing such a head costs more loss where it is active than where "
                "it is dormant (paired interval over texts excludes 0)"
            ),
            control="the largest difference between two halves of the same kind of text",
            known=(
                "3 of 32 heads (9 %) rest on one kind of text and not on another, just under a tenth, and removing one "
                "costs no more where it is active: in four layers the other heads make up for it"
            ),
        ),
        Claim(
            id="pretraining-dynamics",
            kind="untestable",
            claim=(
                "and that the mutual reinforcement mechanism also governs the emergence of extreme-token "
                "phenomena during LLM pretraining."
            ),
            paper_figure="OLMo checkpoints (figure of the paper)",
            criterion="needs checkpoints along the pretraining of a large language model, which do not fit here",
        ),
        Claim(
            id="align",
            kind="untestable",
            claim=(
                "Our results reveal that many of the static and dynamic properties of extreme-token phenomena "
                "predicted by the BB task align with observations in pretrained LLMs."
            ),
            criterion=(
                "dynamic properties need checkpoints of a large model; the static one that the task predicts is "
                "measured in our text model by the row `drain-follows-sink`"
            ),
        ),
        Claim(
            id="drain-follows-sink",
            kind="check",
            claim=(
                "In a trained language model, the more a head rests on the first token, the smaller that token's value."
            ),
            criterion=(
                "over the heads of the text model, sink weight and value ratio have a rank correlation of -0.3 or less"
            ),
            control="the same correlation for the second token, and 200 permutations of the heads",
        ),
        Claim(
            id="rest-is-silence",
            kind="check",
            claim="A dormant head says nothing: removing it and moving all its weight to BOS are nearly the same.",
            criterion=(
                "in the trained one-layer model the excess losses of the two differ by less than 0.05 nats on "
                "rows that are no trigger, where moving the weight to a random other token costs more"
            ),
            control="all weight moved to a random earlier token",
        ),
        Claim(
            id="generator",
            kind="check",
            claim="The generated data is the paper's task: a trigger is always followed by the token before it.",
            criterion="the share of trigger rows that copy is exactly 1, and BOS is never copied",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train small decoders on Bigram-Backcopy, changed and unchanged; read the shipped text model."""
    from headwise.papers import _active_dormant_rows as rows
    from headwise.papers._active_dormant_setup import Toy

    toy = Toy(run)
    found = {**rows.one_layer(toy), **rows.three_layers(toy)}
    language, panels = rows.language_model(run)
    rows.draw(run, toy, panels)
    return found | language
