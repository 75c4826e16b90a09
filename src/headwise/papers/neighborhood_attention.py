"""Each token attends to its nearest neighbours, in one to three dimensions.

Method: headwise/attention/neighborhood.py. Kernels are compared on one thread of a processor: the paper's are for GPUs.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="neighborhood-attention",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    authors="Hassani, Hwu, Shi",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2403.04690",
    repository="SHI-Labs/NATTEN",
    area="attention",
    modules=(
        "headwise.attention.neighborhood",
        "headwise.attention._neighborhood_axes",
        "headwise.attention._neighborhood_tiles",
        "headwise.papers._neighborhood_setup",
        "headwise.papers._neighborhood_rows",
    ),
    changed=(
        "calls under 30 ms are timed three times a turn, and backward passes over 7 rounds, since a whole run "
        "whose timings of two rows disagreed between seeds; the smallest tile in one dimension and the "
        "largest problem were chosen in pilot runs"
    ),
    claims=(
        Claim(
            id="nearest",
            kind="claim",
            claim=(
                "Neighborhood attention reduces the cost of self attention by restricting each token's attention span "
                "to its nearest neighbors."
            ),
            criterion=(
                "on 40 random grids of one to three axes every query sees exactly prod(kernel) keys, and on every axis "
                "no unseen position is nearer than a seen one; on every problem of the tables below its operations are "
                "prod(kernel) / n of self attention's to 1e-9, and its processor time is lower"
            ),
            control="fused self attention over all tokens",
        ),
        Claim(
            id="spectrum",
            kind="claim",
            claim=(
                "This restriction, parameterized by a window size and dilation factor, draws a spectrum of possible "
                "attention patterns between linear projection and self attention."
            ),
            criterion=(
                "a layer with kernel 1 is the linear projection proj(value(x)) and with the whole grid is self "
                "attention, both to 1e-12 in float64; between them, on a 12 x 12 grid, every pair of kernel and "
                "dilation that fits gives another pattern, and at dilation 1 each contains that of the next smaller "
                "odd kernel"
            ),
            control="the same layer with a kernel between the two limits",
        ),
        Claim(
            id="infrastructure",
            kind="untestable",
            claim=(
                "Neighborhood attention, and more generally sliding window attention patterns, have long been bounded "
                "by infrastructure, particularly in higher-rank spaces (2-D and 3-D), calling for the development of "
                "custom kernels, which have been limited in either functionality, or performance, if not both."
            ),
            criterion="a remark about the software of other people up to 2024",
        ),
        Claim(
            id="batched-gemm",
            kind="claim",
            claim=(
                "In this work, we first show that neighborhood attention can be represented as a batched GEMM problem, "
                "similar to standard attention, and implement it for 1-D and 2-D neighborhood attention."
            ),
            criterion=(
                "an implementation whose only products are batched matrix products of tiles equals the masked "
                "definition to 1e-12 (relative to the largest output, float64) on 20 random problems each in one and "
                "two dimensions, with strides, dilations and causal axes"
            ),
            control="gathering the keys of every query, without matrix products of tiles",
        ),
        Claim(
            id="gemm-full-precision",
            kind="claim",
            claim=(
                "These kernels on average provide 895% and 272% improvement in full precision latency compared to "
                "existing naive kernels for 1-D and 2-D neighborhood attention respectively."
            ),
            paper_figure="895 % in 1-D, 272 % in 2-D (abstract; on a GPU)",
            criterion=(
                "in float32 the batched-GEMM kernels improve on average by at least 895 % (1-D, 3 problems) and 272 % "
                "(2-D, 3 problems), as (naive / ours - 1), on the faster of two ways to gather every query's keys; "
                "processor time of one thread, least of 7 runs in turn"
            ),
            control="gathered keys, with batched products or with sums; a matrix product of as many operations",
        ),
        Claim(
            id="inefficiencies",
            kind="claim",
            claim=(
                "We find certain inherent inefficiencies in all unfused neighborhood attention kernels that bound "
                "their performance and lower-precision scalability."
            ),
            criterion=(
                "on every problem the unfused kernels hold at least the n prod(kernel) weights of every head at once "
                "and the fused ones less; and going from float32 to bfloat16 multiplies the speed of the unfused "
                "kernels by less than that of the fused ones, in the mean over all problems"
            ),
            control="the fused kernels on the same problems",
        ),
        Claim(
            id="fused",
            kind="claim",
            claim=(
                "We also developed fused neighborhood attention; an adaptation of fused dot-product attention kernels "
                "that allow fine-grained control over attention across different spatial axes."
            ),
            criterion=(
                "with kernel, stride, dilation and causality drawn for each axis by itself, tiles of fused attention "
                "equal the masked definition to 1e-12 (float64, relative to the largest entry) on 20 random problems "
                "each in one, two and three dimensions: outputs, and the gradients of queries, keys and values"
            ),
            control="the same comparison with the settings of two axes exchanged, which must differ",
        ),
        Claim(
            id="memory",
            kind="claim",
            claim=(
                "Known for reducing the quadratic time complexity of self attention to a linear complexity, "
                "neighborhood attention can now enjoy a reduced and constant memory footprint [...]."
            ),
            criterion=(
                "four times the tokens take 3 to 5.5 times the processor time, in one and in two dimensions; what is "
                "held beside inputs and outputs is less than a quarter of what the gathering kernel holds, and at "
                "four times the tokens at most 1.05 times as much"
            ),
            control="the gathering kernel; self attention's time at four times the tokens",
        ),
        Claim(
            id="record-latency",
            kind="untestable",
            claim="[...] and record-breaking half precision latency.",
            criterion="a record among GPU kernels of 2024; it takes such a GPU and those kernels",
        ),
        Claim(
            id="circumvent",
            kind="claim",
            claim=(
                "We observe that our fused kernels successfully circumvent some of the unavoidable inefficiencies in "
                "unfused implementations."
            ),
            criterion=(
                "on every problem the fused kernels hold less than a quarter of what the unfused ones hold beside "
                "inputs and outputs, and in float32 and in bfloat16 their time, averaged over problems as a ratio, is "
                "lower"
            ),
            control="the unfused kernels on the same problems",
            known=(
                "the room is saved (fused tiles hold at most 6 % of it), time only in bfloat16 (0.95 to 0.98 of the "
                "unfused); in float32 fused tiles take 1.04 to 1.08 times as long. The traffic that fusing saves on a "
                "GPU is likely not there on a processor, where the weights of a tile fit its cache"
            ),
        ),
        Claim(
            id="half-precision",
            kind="claim",
            claim=(
                "While our unfused GEMM-based kernels only improve half precision performance compared to naive "
                "kernels by an average of 496% and 113% in 1-D and 2-D problems respectively, our fused kernels "
                "improve naive kernels by an average of 1607% and 581% in 1-D and 2-D problems respectively."
            ),
            paper_figure="unfused 496 % and 113 %, fused 1607 % and 581 % (abstract; on a GPU)",
            criterion=(
                "in bfloat16 the fused kernels improve the gathering ones by at least 1607 % (1-D) and 581 % (2-D) on "
                "average, the unfused by at least 496 % and 113 % and by less than the fused"
            ),
            control="gathered keys, with batched products or with sums, whichever is faster",
            known=(
                "unfused 531 to 682 % (1-D) and 631 to 661 % (2-D), fused 602 to 771 % and 579 to 610 %: 1,607 % in "
                "1-D is not reached, and in 2-D the fused are no faster than the unfused. Halving the bytes makes "
                "gathering nearly twice as fast here, and tiles no faster: this processor gains nothing from bfloat16 "
                "in products of this size"
            ),
        ),
        Claim(
            id="tiles-on-a-processor",
            kind="check",
            claim="Tiles are what a user without a GPU wants: far faster than the two formulations in use.",
            criterion=(
                "at least 5 times as fast as gathering at 56 x 56 with kernel 7, and at least 10 times as fast as "
                "fused attention under a dense mask at 8,192 tokens with kernel 256 (float32, one thread)"
            ),
            control="gathered keys; a dense mask",
        ),
        Claim(
            id="backward",
            kind="check",
            claim="The backward walks the same tiles.",
            criterion=(
                "it takes at most 2.5 times the forward at 56 x 56 with kernel 7 and at 8,192 tokens with kernel 256 "
                "(float32, one thread)"
            ),
            control="autograd through the slices of the same tiles",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Compare gathering, batched matrix products and fused tiles on the same problems, and each with the definition."""
    from headwise.papers import _neighborhood_rows as rows
    from headwise.papers._neighborhood_setup import time_problems

    times = time_problems(run)
    rows.draw(run, times)
    return {
        "nearest": rows.nearest(run, times),
        "spectrum": rows.spectrum(run),
        "batched-gemm": rows.batched_gemm(run),
        "gemm-full-precision": rows.full_precision(times),
        "inefficiencies": rows.inefficiencies(times),
        "fused": rows.fused(run),
        "memory": rows.memory(run),
        "circumvent": rows.circumvent(times),
        "half-precision": rows.half_precision(times),
        "tiles-on-a-processor": rows.on_a_processor(run),
        "backward": rows.backward(run),
    }
