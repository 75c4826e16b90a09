"""Attention weights that depend on positions only, for algorithms.

Method: headwise/attention/positional.py and its network headwise/models/positional.py. The runs train it and standard
transformers of the same form on prefix sums and minima, on recall by key and on chains of pointers.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="positional-attention",
    title="Positional Attention: Expressivity and Learnability of Algorithmic Computation",
    authors="Back de Luca, Giapitzakis, Yang, Veličković, Fountoulakis",
    year=2025,
    venue="ICML 2025, PMLR 267:2335-2390",
    arxiv="2410.01686",
    repository="opallab/positional_attention",
    area="attention",
    modules=(
        "headwise.attention.positional",
        "headwise.models.positional",
        "headwise.tasks.algorithmic",
        "headwise.papers._positional_setup",
        "headwise.papers._positional_rows",
    ),
    changed=(
        "3,000 steps of batch 32 at a learning rate of 3e-3, chosen on seeds 100 and 101 with the positional "
        "network alone; in the row hops 1,500 steps, chosen on seeds 100 and 101 with the standard network alone, and "
        "numbers drawn each by itself since a run of seed 0 with 2,000 steps on lists of alike numbers, in which "
        "neither had learned to follow pointers (standard 8 %, positional 21 % of the variance); its criterion stayed"
    ),
    claims=(
        Claim(
            id="parallel-algorithms",
            kind="claim",
            claim=(
                "Notably, many parallel algorithms communicate between processors solely using positional information."
            ),
            criterion=(
                "positional transformers with parameters written by hand, whose nodes read the node 1, 2 and 4 places "
                "before them whatever the numbers are, give prefix sums, minima and maxima of 8 numbers exactly (1e-9, "
                "float64, numbers up to 1,000) in floor(log2 8) + 1 layers"
            ),
            control="the same parameters with weights spread evenly over the nodes",
        ),
        Claim(
            id="positions-only",
            kind="check",
            claim=(
                "Inspired by this observation, we investigate how Transformers can execute algorithms using positional "
                "attention, where attention weights depend exclusively on positional encodings."
            ),
            criterion=(
                "in a trained network weights of two inputs are bit-equal, do not change the gradient of the input "
                "(0), and one layer's attention is linear in its input (1e-5 of the largest value)"
            ),
            control="the standard transformer's layer is not linear",
        ),
        Claim(
            id="expressivity",
            kind="untestable",
            claim=(
                "We prove that Transformers with positional attention (positional Transformers) maintain the same "
                "expressivity of parallel computational models, incurring a logarithmic depth cost relative to the "
                "input length."
            ),
            criterion=(
                "a proof about all programs of a model of parallel machines; three programs are built by hand in the "
                "row parallel-algorithms, at logarithmic depth"
            ),
        ),
        Claim(
            id="trade-off",
            kind="untestable",
            claim=(
                "Our results show that positional Transformers introduce a learning trade-off: while they exhibit "
                "better theoretical dependence on parameter norms, certain tasks may require more layers, which can, "
                "in turn, increase sample complexity."
            ),
            criterion=(
                "a statement about bounds on the number of samples; what is given up is measured in the row recall"
            ),
        ),
        Claim(
            id="out-of-distribution",
            kind="claim",
            claim=(
                "Finally, we empirically explore the out-of-distribution performance of positional Transformers and "
                "find that they perform well in tasks where their underlying algorithmic solution relies on positional "
                "information."
            ),
            paper_figure=(
                "median test MSE of 10 runs, positional / standard (official result files): sum 1.6e-3 / 1.9 at 3 "
                "times the training range and 5.8e-2 / 88 at 10 times; min 1.2e-3 / 0.39 and 4.3e-2 / 20"
            ),
            criterion=(
                "on prefix sums and minima of 8 numbers the standard transformer's test MSE is at least 10 times the "
                "positional one's at 3 and at 10 times the training range; the positional one's is below 1 % of the "
                "variance of the answers in the training range, and below 5 % at 10 times"
            ),
            control="a standard transformer of the same form, with wider heads, on the same batches",
        ),
        Claim(
            id="rope",
            kind="check",
            claim="Rotary positions in the standard transformer do not close the gap.",
            criterion="on prefix sums, at 10 times the range, rotary positions give at least 10 times its MSE",
            control="the standard transformer without them",
        ),
        Claim(
            id="official-rope",
            kind="check",
            claim="The official baseline's rotation, by the index of the head, changes nothing.",
            criterion=(
                "turning queries and keys by their head's index leaves all scores as they are (1e-5); turning them by "
                "their token's index does not"
            ),
        ),
        Claim(
            id="recall",
            kind="check",
            claim="Where the route depends on the data, attention by position is the worse one at the same depth.",
            criterion=(
                "on associative recall (7 pairs, 16 symbols), in distribution, 2 layers: the standard transformer is "
                "right in at least 90 % and at least 20 points more often than the positional one"
            ),
            control="the positional transformer with 4 layers, and chance, 1 of 16",
        ),
        Claim(
            id="hops",
            kind="check",
            claim=(
                "Where every step of the route depends on the data, attention by position does not win in the training "
                "range, nor is it right far from it."
            ),
            paper_figure=(
                "k-hop induction heads: the standard network needs 3 layers, the positional one more, and both fail "
                "out of distribution (from a summary of the ICML version)"
            ),
            criterion=(
                "on chains of two pointers among 8 places, as many layers as for the algorithms: in the training range "
                "of the numbers reached, the standard transformer's test MSE is below 5 % of the variance of the "
                "answers and the positional one's is at least as large as the standard one's; at 10 times the range "
                "the positional one's is above the 5 % that it keeps to on prefix sums and minima"
            ),
            control="the standard transformer in each range; a guess of the list's mean",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train both kinds of transformer on both algorithms at once, rotary positions on one, and all on recall.

    Then both on pointers.
    """
    from headwise.papers import _positional_rows as rows
    from headwise.papers._positional_setup import hopping, recalls, trained

    found = trained(run)
    recall = recalls(run)
    hops = hopping(run)
    rows.draw(run, found, hops)
    return {
        "parallel-algorithms": rows.parallel_algorithms(run),
        "positions-only": rows.positions_only(found),
        "out-of-distribution": rows.out_of_distribution(found),
        "rope": rows.rope(found),
        "official-rope": rows.official_rope(run),
        "recall": rows.recall(recall),
        "hops": rows.hops(hops, run),
    }
