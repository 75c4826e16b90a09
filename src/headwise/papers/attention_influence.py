"""Choose pretraining data by how much a model without its retrieval heads suffers on it.

Method: headwise/heads/influence.py; `headwise score` and `headwise select` run it over a corpus.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="attention-influence",
    title="AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection",
    authors="Hua, Wu, Zhang, Shen",
    year=2025,
    arxiv="2505.07293",
    area="heads",
    modules=(
        "headwise.heads.influence",
        "headwise.hf.replay",
        "headwise.tasks.documents",
        "headwise.papers._influence_setup",
        "headwise.papers._influence_rows",
    ),
    specimens=("tasks",),
    claims=(
        Claim(
            id="prior-approaches",
            kind="untestable",
            claim=(
                "Prior approaches typically rely on supervised classifiers to identify such data, which requires "
                "labeling by humans or LLMs, often introducing domain-specific biases."
            ),
            criterion="a remark about other work; no classifier of pretraining data and its labels are at hand here",
        ),
        Claim(
            id="effective",
            kind="claim",
            claim=(
                "Due to the attention heads being crucial to in-context reasoning, we propose AttentionInfluence, a "
                "simple yet effective, training-free method without supervision signal."
            ),
            criterion=(
                "160 held-out documents of 64 tokens: those that need their context (repeats, needles) and those that "
                "do not (bigram text without back-copies, addition) are told apart by the score of the tasks model, "
                "its retrieval heads attending evenly, with an AUC of 0.95 or more; by its plain loss, whichever way "
                "round, with 0.75 at most; by the score with other heads of the same layers with less on average"
            ),
            control="every other set of heads of the same layers, dead heads too; the plain loss; zeroed heads",
        ),
        Claim(
            id="selector",
            kind="claim",
            claim=(
                "Our approach enables a small pretrained language model to act as a strong data selector through a "
                "simple attention head masking operation."
            ),
            criterion=(
                "of a shuffled pool of 2,048 documents of 32 tokens, half of which need their context, at least 90 % "
                "of the half with the highest scores do, and more than of a random half, the half of lowest or "
                "highest loss, and the half that repeats itself most"
            ),
            control="those four halves, and the half chosen with every other set of heads of the same layers",
        ),
        Claim(
            id="definition",
            kind="check",
            claim="Specifically, we identify retrieval heads and compute the loss difference when masking these heads.",
            criterion=(
                "for 16 documents the score is (masked - plain) / plain of the model's own loss to 1e-5, and exactly "
                "0 with no head masked; the heads are those of 0.5 or more on needles, top first"
            ),
        ),
        Claim(
            id="scale",
            kind="untestable",
            claim=(
                "We apply AttentionInfluence to a 1.3B-parameter dense model to conduct data selection on the SmolLM "
                "corpus of 241B tokens, and mix the SmolLM corpus with the selected subset comprising 73B tokens to "
                "pretrain a 7B-parameter dense model using 1T training tokens and WSD learning rate scheduling."
            ),
            criterion=(
                "what was done, at a scale of thousands of GPU days; headwise score runs the same on any causal model "
                "and corpus, and the rows below repeat it with a model of a million parameters"
            ),
        ),
        Claim(
            id="improvement",
            kind="claim",
            claim=(
                "Our experimental results demonstrate substantial improvements, ranging from 1.4pp to 3.5pp, across "
                "several knowledge-intensive and reasoning-heavy benchmarks (i.e., MMLU, MMLU-Pro, AGIEval-en, GSM8K, "
                "and HumanEval)."
            ),
            paper_figure="1.4 to 3.5 points (abstract)",
            criterion=(
                "on every task that was in the pool and has answers (repeats and needles, answered from the context; "
                "addition, from the weights) a larger model trained on the half of highest scores gets at least 1.4 "
                "points more held-out answer tokens right than one trained for as many steps on the whole pool, and "
                "more than on a random half"
            ),
            control="the whole pool, a random half, the halves of lowest and highest loss, the half that repeats most",
            known=(
                "the chosen half holds next to no addition, which needs no context, so what stands in the weights is "
                "not learned (0 to 5 % against 22 to 60 %); repeats gain 14 to 18 points, needles about one. Without "
                "the rest of the corpus mixed in again, as the paper does, this is what choosing costs"
            ),
        ),
        Claim(
            id="improvement-elsewhere",
            kind="claim",
            claim="The same improvements, on tasks of which no document was in the pool.",
            paper_figure="1.4 to 3.5 points (abstract); whether the corpus held such tasks is not said there",
            criterion=(
                "the same for indirect objects, coloured objects and multiple choice, which were not in the pool: at "
                "least 1.4 points more than trained on the whole pool, and more than on a random half, on each"
            ),
            control="the same five other models",
            known=(
                "after 200 steps no arm answers tasks that it has not seen: all lie between 0 and 5 %, and the "
                "differences are single documents; training long enough for such transfer is beyond this run"
            ),
        ),
        Claim(
            id="weak-to-strong",
            kind="claim",
            claim=(
                "This demonstrates an effective weak-to-strong scaling property, with small models improving the final "
                "performance of larger models-offering a promising and scalable path for reasoning-centric data "
                "selection."
            ),
            criterion=(
                "the trained model has more parameters than the scorer; on the tasks of the pool that are answered "
                "from the context (mean of repeats and needles) it ends at least 1.4 points above the same model "
                "trained on the whole pool and on a random half, and reaches where the whole pool ends in fewer steps "
                "than either"
            ),
            control="the same five other models",
        ),
        Claim(
            id="shared-prefix",
            kind="check",
            claim="Starting the masked pass at the first masked layer changes nothing.",
            criterion="both losses of 64 documents of several lengths differ from two whole passes by at most 1e-6",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Score documents whose need for context is known, choose halves of a pool, train a larger model on each."""
    from headwise.papers import _influence_rows as rows
    from headwise.papers._influence_setup import Selector, documents, make_pool, train_arms

    selector = Selector.load(run)
    held = documents(64, 40, 100 + run.seed)
    pool = make_pool(run.seed)
    halves = selector.halves(pool, run)
    arms = train_arms(pool, halves, run)
    told = selector.told_apart(held, run)
    rows.draw(run, told, arms)
    return {
        "effective": rows.effective(told),
        "selector": rows.chosen(selector, pool, halves, run),
        "definition": rows.definition(selector, held),
        "improvement": rows.improvement(arms, rows.IN_POOL),
        "improvement-elsewhere": rows.improvement(arms, rows.ELSEWHERE),
        "weak-to-strong": rows.weak_to_strong(selector, arms),
        "shared-prefix": rows.shared_prefix(selector, held),
    }
