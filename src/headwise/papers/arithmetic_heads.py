"""A few heads read operands and operators, MLPs make the result: find them, remove them, tune only them.

Methods: headwise/heads/patching.py finds heads, headwise/heads/finetuning.py tunes them.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="arithmetic-heads",
    title="Interpreting and Improving Large Language Models in Arithmetic Calculation",
    authors="Zhang, Wan, Zhang, Cheung, Tian, Shen, Ye",
    year=2024,
    venue="ICML 2024",
    arxiv="2409.01659",
    area="heads",
    modules=(
        "headwise.heads.finetuning",
        "headwise.heads.patching",
        "headwise.heads._patch_runs",
        "headwise.heads.effects",
        "headwise.heads.attribution",
        "headwise.heads.masses",
        "headwise.hf.parameter_slices",
        "headwise.tasks.symbol_arithmetic",
        "headwise.papers._arithmetic_setup",
        "headwise.papers._arithmetic_rows",
    ),
    specimens=("arithmetic",),
    claims=(
        Claim(
            id="few-heads",
            kind="claim",
            claim=(
                "Through comprehensive experiments, we find that LLMs frequently involve a small fraction (< 5%) of "
                "attention heads,"
            ),
            paper_figure="fewer than 5 % of the heads (abstract)",
            criterion=(
                "in the shipped arithmetic model, heads ranked by path patching on additions (operands or operator "
                "changed, last position, receivers the logits): the shortest prefix of the ranking whose removal (mean "
                "ablation) costs at least 30 points of addition accuracy is less than 5 % of the heads"
            ),
            control="the share that a single head is; the shortest prefix of the reversed ranking that costs as much",
            known=(
                "the model has 24 heads, one is already 4.2 % of them, and the eight heads of its last layer read "
                "the operands side by side: five or six of them must go before 30 points are lost (the "
                "weaker half of all heads together does not cost as much)"
            ),
        ),
        Claim(
            id="focus",
            kind="claim",
            claim="which play a pivotal role in focusing on operands and operators during calculation processes.",
            paper_figure="attention maps of key heads (figure of the paper, recalled)",
            criterion=(
                "each of the two heads with the strongest effects puts, from the row that answers, at least half of "
                "its attention on operands and operator together, for addition and subtraction, in both templates "
                "(which put them at different distances)"
            ),
            control="the mean over all other heads of the same layers; these tokens' share of the prompt",
        ),
        Claim(
            id="pivotal",
            kind="claim",
            claim="attention heads, which play a pivotal role [...] during calculation processes.",
            criterion=(
                "removing the two heads with the strongest effects (mean ablation) costs at least 30 points of "
                "addition accuracy; layer-matched pairs of other heads cost less than 15 in the mean (all of them, the "
                "whole distribution is shown), and repeats lose less than 15 points without the two heads"
            ),
            control="all layer-matched pairs of other heads: mean, worst, and the share that costs as much",
            known=(
                "the eight heads of the last layer share the work, so that removing any two of them costs little: "
                "the two strongest 3 to 4 points, in two of three runs more than 93 % of the other pairs, never 30"
            ),
        ),
        Claim(
            id="mlps",
            kind="claim",
            claim=(
                "Subsequently, the information from these operands is processed through multi-layer perceptrons "
                "(MLPs), progressively leading to the final solution."
            ),
            paper_figure="the projection on the answer grows over late MLPs (figure of the paper, recalled)",
            criterion=(
                "of the result's logit, less the mean of all ten digits' and split exactly at the last position, MLPs "
                "write at least 70 %; and read through the final norm and unembedding (logit lens) it does not fall "
                "from any layer to the next"
            ),
            control="the MLPs' share of the answer's logit where nothing is calculated: chosen letters",
            known=(
                "MLPs do write 81 to 86 % of the result's logit (28 % where letters are chosen), but at one stroke: "
                "operands meet in the last of three layers, before which the lens reads about 0, and its MLP alone "
                "makes the result; nothing grows step by step, and what is about 0 also falls, by up to 1.1"
            ),
        ),
        Claim(
            id="transfer",
            kind="claim",
            claim=(
                "These pivotal heads/MLPs, though identified on a specific dataset, exhibit transferability across "
                "different datasets and even distinct tasks."
            ),
            paper_figure="heads found on additions matter for other operations and for word problems (recalled)",
            criterion=(
                "the two heads found on additions in one template cost, removed, at least 30 points of accuracy on "
                "additions in the other template and on subtractions in both, each time more than twice the mean of "
                "layer-matched pairs; and the effects of all heads and MLPs there correlate with those on the first "
                "additions with 0.6 or more (Spearman)"
            ),
            control="the same on chosen letters (the same roles, nothing to calculate) and on repeats",
            known=(
                "the effects transfer (rank correlations of 0.8 to 0.99), but the two heads of the first additions "
                "are two of eight that share the work, and removing them costs less than 8 points on any task, on "
                "additions as well"
            ),
        ),
        Claim(
            id="tuning-gain",
            kind="claim",
            claim=(
                "This insight prompted us to investigate the potential benefits of selectively fine-tuning these "
                "essential heads/MLPs to boost the LLMs' computational performance. We empirically find that such "
                "precise tuning can yield notable enhancements on mathematical prowess,"
            ),
            paper_figure="precise tuning of Llama 2 beats full tuning on maths sets (recalled; no table was read)",
            criterion=(
                "from an early checkpoint with fewer than 60 % of the results right, 200 steps on sums and differences "
                "of only the two strongest heads and the strongest MLP (by their effects in that checkpoint) recover "
                "at least 70 % of what as many steps of full tuning gain in accuracy on problems drawn anew (over all "
                "hundred pairs of digits, which training saw: nothing is claimed of unseen pairs)"
            ),
            control="as many entries elsewhere (other heads of the layers, another MLP), and low-rank adapters",
        ),
        Claim(
            id="no-compromise",
            kind="claim",
            claim="without compromising the performance on non-mathematical tasks.",
            paper_figure="non-maths benchmarks stay level (recalled; no table was read)",
            criterion=(
                "after the same precise tuning, repeats and chosen letters lose less than 5 points of accuracy each "
                "(none of them was in the tuning data), and no more together than after full tuning"
            ),
            control="full tuning, low-rank adapters of as many entries, and as many entries elsewhere",
            known=(
                "precise tuning keeps most of what full tuning forgets (9 to 11 points of repeats lost against 70 "
                "to 74, 6 to 12 of letters against 99), but more than 5 points go; equally many entries elsewhere "
                "and low-rank adapters forget as little, so it is the number of entries that protects here, and not "
                "which they are"
            ),
        ),
        Claim(
            id="foundation",
            kind="untestable",
            claim=(
                "Our work serves as a preliminary exploration into the arithmetic calculation abilities inherent in "
                "LLMs, laying a solid foundation to reveal more intricate mathematical tasks."
            ),
            criterion="what later work builds on this is no measurement of a model",
        ),
        Claim(
            id="same-prompt",
            kind="check",
            claim="A counterfactual that is the prompt itself has no effect, for any head or MLP.",
            criterion="the largest effect over all nodes is 0",
        ),
        Claim(
            id="two-questions",
            kind="check",
            claim="Changing an operand and changing the operator are different questions.",
            criterion=(
                "the effects of all heads and MLPs on changed operands and on changed operators differ by 0.02 or more "
                "of the whole effect for at least one node"
            ),
            control="the same difference between two halves of the prompts with changed operands",
        ),
        Claim(
            id="frozen",
            kind="check",
            claim="Precise tuning leaves every entry outside the chosen heads and MLPs bit-identical.",
            criterion=(
                "after the precise tuning of this run, with weight decay, no entry outside the chosen slices and MLP "
                "differs in any bit, and at least 90 % of those inside do"
            ),
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Find, remove and read the heads of the shipped model; tune an early checkpoint of it in several ways."""
    from headwise.papers import _arithmetic_rows as rows
    from headwise.papers._arithmetic_setup import Calculator, Removals, Tunings

    model = Calculator.load(run)
    removals = Removals.of(model, run)
    tunings = Tunings.of(run)
    rows.draw(run, model, removals, tunings)
    return {
        "few-heads": rows.few_heads(model, removals),
        "focus": rows.focus(model),
        "pivotal": rows.pivotal(removals),
        "mlps": rows.mlps(model),
        "transfer": rows.transfer(model, removals),
        "tuning-gain": rows.tuning_gain(tunings),
        "no-compromise": rows.no_compromise(tunings),
        "same-prompt": rows.same_prompt(model),
        "two-questions": rows.two_questions(model),
        "frozen": rows.frozen(tunings),
    }
