"""A router lets each token use only some heads.

Method: headwise/attention/mixture_of_head.py; `headwise.convert(model, to="mixture-of-head")` brings it to trained
models.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="mixture-of-head-attention",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    authors="Jin, Zhu, Yuan, Yan",
    year=2024,
    arxiv="2410.11842",
    repository="SkyworkAI/MoH",
    area="attention",
    modules=(
        "headwise.attention.mixture_of_head",
        "headwise.attention.routed",
        "headwise.models.conversion",
        "headwise.models.convert_mixture_of_head",
        "headwise.models.moh_presets",
        "headwise.papers._moh_rows",
        "headwise.papers._moh_setup",
    ),
    changed=(
        "two networks of a kind are trained for a seed, not three, for time; a pilot on seeds 0 to 3 had been "
        "seen (75 % active: about 1.1 points below)"
    ),
    claims=(
        Claim(
            id="summation",
            kind="claim",
            claim="We show that multi-head attention can be expressed in the summation form.",
            criterion=(
                "the output of a trained layer is the sum over its heads of the head's output times its block of the "
                "output projection, and the projection's bias, to 1e-5"
            ),
            control="the same sum with two heads' blocks exchanged",
        ),
        Claim(
            id="efficient",
            kind="claim",
            claim=(
                "First, MoH enables each token to select the appropriate attention heads, enhancing inference "
                "efficiency without compromising accuracy or increasing the number of parameters."
            ),
            paper_figure="ImageNet-1K: TransNeXt-B 84.8, MoH-ViT-B with 75 % of the heads 84.9 (repository)",
            criterion=(
                "digits, vision transformers of 8 heads (two a seed), learned router, 2 shared and 4 of 6 routed: "
                "every routed head is used by 5 to 95 % of the test tokens; attention at 50 % of the heads and 1,024 "
                "tokens takes less time than dense attention; accuracy is not below that of multi-head attention; the "
                "network has no more parameters"
            ),
            control="multi-head attention of the same sizes, trained alike",
            known=(
                "half of the heads take 0.58 to 0.65 of the time, but networks of 8 heads of 4 channels end 1.9 to 3.0 "
                "points below multi-head attention (3 seeds, 2 networks each), in two seeds a head is used by more "
                "than 95 % of the tokens, and learned routers add 3.5 % of parameters (1.2 % of attention in ViT-B)"
            ),
        ),
        Claim(
            id="weighted",
            kind="claim",
            claim=(
                "Second, MoH replaces the standard summation in multi-head attention with a weighted summation, "
                "introducing flexibility to the attention mechanism and unlocking extra performance potential."
            ),
            criterion=(
                "digits: with the same gates and every head active (the weighted sum alone) accuracy is above that of "
                "multi-head attention"
            ),
            control="multi-head attention; the gates with 4 and with 2 of 6 routed heads",
            known=(
                "with every head active the gates alone cost 0.6 to 1.8 points on the digits (3 seeds, 2 networks "
                "each), more than half of what the mixtures lose: at 8 heads of 4 channels and 360 steps the "
                "weighted sum does not help"
            ),
        ),
        Claim(
            id="outperforms",
            kind="claim",
            claim=(
                "Extensive experiments on ViT, DiT, and LLMs demonstrate that MoH outperforms multi-head attention by "
                "using only 50%-90% of the attention heads."
            ),
            paper_figure=(
                "ImageNet-1K: B 84.8, 84.9 at 75 %, 84.7 at 50 %; DiT-XL/2 FID 3.22, 2.94 at 90 %; LLM-S 43.9, 44.6 at "
                "75 %, 45.4 at 50 % (tables of the repository)"
            ),
            criterion=(
                "digits: accuracy with 75 % of the heads active and accuracy with 50 % are both above that of "
                "multi-head attention"
            ),
            control="multi-head attention; the same gates with every head active",
            known=(
                "on the digits 75 % of the heads end 1.9 to 3.0 points below multi-head attention and 50 % end 1.3 to "
                "2.7 below (3 seeds, 2 networks each), in networks of 8 heads of 4 channels"
            ),
        ),
        Claim(
            id="continue-tuned",
            kind="claim",
            claim=(
                "Moreover, we demonstrate that pre-trained multi-head attention models, such as LLaMA3-8B, can be "
                "further continue-tuned into our MoH models."
            ),
            paper_figure="over 95 % of the quality within 10B tokens (paper, recalled)",
            criterion=(
                "digits: the trained multi-head network, converted with the query-norm router to 4 shared and 2 of 4 "
                "routed heads and tuned for a fifth of its steps, has at least 95 % of its accuracy before, and at "
                "least as much as right after the conversion"
            ),
            control="accuracy at once; two routed heads of each token at random, at once and tuned; dense, tuned",
        ),
        Claim(
            id="llama",
            kind="untestable",
            claim=(
                "Notably, MoH-LLaMA3-8B achieves an average accuracy of 64.0% across 14 benchmarks, outperforming "
                "LLaMA3-8B by 2.4% by utilizing only 75% of the attention heads."
            ),
            paper_figure="61.6 to 64.0 (tables of the repository); most of it on benchmarks that the new data is near",
            criterion=(
                "tuning an 8B model on 100B tokens; headwise.convert makes the same model of the same checkpoint "
                "(32 heads, 16 shared, 8 of 16 routed), without the training"
            ),
        ),
        Claim(
            id="non-inferior",
            kind="check",
            claim="With 75 % of its heads active the small network loses at most 2 points, and no routed head dies.",
            criterion=(
                "accuracy with 2 shared and 4 of 6 routed heads is at most 2 points below that of multi-head "
                "attention, and every routed head is used by 5 to 95 % of the test tokens"
            ),
            control="multi-head attention of the same sizes, trained alike",
        ),
        Claim(
            id="speed",
            kind="check",
            claim="Computing only the chosen heads is faster than computing all of them.",
            criterion=(
                "16 heads of 64 channels, 4 shared and 4 of 12 routed: the sparse path takes less time than fused "
                "dense attention at 1,024 and at 2,048 tokens, bidirectional, medians of 5 alternating runs"
            ),
            control="causal attention, and three quarters of the heads",
        ),
        Claim(
            id="limit",
            kind="check",
            claim="Routers of zeros that choose every head are multi-head attention; the sparse path is the dense one.",
            criterion=(
                "outputs differ by at most 1e-6 from attention with the same weights, and those of the two paths by at "
                "most 1e-6 for a trained network"
            ),
        ),
        Claim(
            id="activated",
            kind="check",
            claim="The head counts of the paper's networks come to the percentages in their names.",
            paper_figure="75, 50, 80, 75, 90 and 75 % (names of the networks)",
            criterion="active heads over heads, summed over layers, round to them for all six",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train the small networks, convert one, tune it, and time the attention alone."""
    from headwise.papers import _moh_rows as rows
    from headwise.papers._moh_setup import Converted, train_networks

    networks = train_networks(run)
    converted = Converted.of(networks, run)
    times = rows.measure_times(run)
    rows.draw(run, networks, converted, times)
    return {
        "summation": rows.summation(networks),
        "efficient": rows.efficient(networks, times),
        "weighted": rows.weighted(networks),
        "outperforms": rows.outperforms(networks),
        "continue-tuned": rows.continue_tuned(networks, converted),
        "non-inferior": rows.non_inferior(networks),
        "speed": rows.speed(times),
        "limit": rows.limit(networks),
        "activated": rows.activated(),
    }
