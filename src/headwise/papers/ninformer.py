"""A token-mixing network generates the gate of another.

Method: headwise/attention/mixer_gate.py and headwise/models/ninformer.py.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="ninformer",
    title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    authors="Abdullah, Aydin",
    year=2024,
    venue="Neural Computing and Applications, 2025",
    arxiv="2403.02411",
    repository="Abdullah-88/NiNformer",
    area="models",
    modules=(
        "headwise.attention.mixer_gate",
        "headwise.models.ninformer",
        "headwise.papers._ninformer_setup",
    ),
    changed=(
        "one start of a network for a seed, not two, for time; the row better-on-digits was a claim until it "
        "was seen that its sentence speaks of several data sets"
    ),
    claims=(
        Claim(
            id="main-component",
            kind="untestable",
            claim=(
                "The Attention mechanism is the main component of the Transformer architecture, and since its "
                "introduction, it has led to significant advancements in Deep Learning that span many domains and "
                "multiple tasks. The Attention Mechanism was utilized in Computer Vision as the Vision Transformer "
                "ViT, and its usage has expanded into many tasks in the vision domain, such as classification, "
                "segmentation, object detection, and image generation."
            ),
            criterion="remarks about the field",
        ),
        Claim(
            id="drawback",
            kind="untestable",
            claim=(
                "While this mechanism is very expressive and capable, it comes with the drawback of being "
                "computationally expensive and requiring datasets of considerable size for effective optimization."
            ),
            criterion=(
                "a remark about attention at large, without a measure; the cost beside this paper's block is measured "
                "in the row compute, training on little data in the row better-than-vit"
            ),
        ),
        Claim(
            id="other-designs",
            kind="untestable",
            claim=(
                "To address these shortcomings, many designs have been proposed in the literature to reduce the "
                "computational burden and alleviate the data size requirements. Examples of such attempts in the "
                "vision domain are the MLP-Mixer, the Conv-Mixer, the Perciver-IO, and many more."
            ),
            criterion="a remark about other work",
        ),
        Claim(
            id="compute",
            kind="claim",
            claim=(
                "This paper introduces a new computational block as an alternative to the standard ViT block that "
                "reduces the compute burdens by replacing the normal Attention layers with a Network in Network "
                "structure"
            ),
            criterion=(
                "in the official setting for CIFAR-10 (64 tokens, width 256, hidden size 512, 4 blocks) the blocks "
                "need fewer multiply-adds than ViT blocks of the same widths"
            ),
            control="256 and 1,024 tokens, and MLP-Mixer blocks of the same widths",
            known=(
                "a block costs N (2td + 2cd + d^2 + 2fd) against N (4 d^2 + 2fd) + 2 N^2 d, so it is cheaper only from "
                "N = t + c - 1.5 d = 640 tokens on at these widths; at the paper's own 64 it costs 1.53 times as much"
            ),
        ),
        Claim(
            id="dynamic",
            kind="claim",
            claim=(
                "that enhances the static approach of the MLP Mixer with a dynamic system of learning an element-wise "
                "gating function by a token mixing process."
            ),
            criterion=(
                "in the trained network the multipliers of a token change with the other tokens (every token's "
                "influence on every other token's multiplier is above 0), and the test accuracy on digits is at least "
                "that of an MLP-Mixer of the same width and depth"
            ),
            control=(
                "an MLP-Mixer of as many parameters (6 blocks); the sum instead of the product of the same two "
                "factors; no token mixing in the gate"
            ),
        ),
        Claim(
            id="better",
            kind="untestable",
            claim=(
                "Extensive experimentation shows that the proposed design provides better performance than the "
                "baseline architectures on multiple datasets applied in the image classification task of the vision "
                "domain."
            ),
            criterion="several data sets of photographs; the row better-on-digits has one of small pictures",
        ),
        Claim(
            id="better-on-digits",
            kind="check",
            claim="The same, on one small data set.",
            criterion=(
                "test accuracy on digits (600 training images, equal width, depth and steps) above that of both "
                "baselines, the ViT with learned positions and the MLP-Mixer"
            ),
            control=(
                "an MLP-Mixer of as many parameters (6 blocks); the sum instead of the product of the same two "
                "factors; parameters of all"
            ),
        ),
        Claim(
            id="better-than-vit",
            kind="check",
            claim="The same, against the ViT alone.",
            criterion="at least one point above the ViT with learned positions",
            control="parameters of both",
        ),
        Claim(
            id="needs-mixing",
            kind="check",
            claim="What makes the gate work is its token mixing.",
            criterion="at least 10 points above the same network without token mixing in the gate",
            control="the network without it",
        ),
        Claim(
            id="operations",
            kind="check",
            claim="Multiply-adds and parameters follow the closed formulas.",
            criterion=(
                "counted on the modules, 4 blocks at 64, 256 and 1,024 tokens need exactly N (2td + 2cd + d^2 + 2fd) a "
                "block, ViT blocks N (4 d^2 + 2fd) + 2 N^2 d; the classifier for CIFAR-10 has 2,652,170 parameters"
            ),
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train the network, its two cut-down forms, two MLP-Mixers and a ViT on digits; count their operations."""
    from headwise.papers import _ninformer_setup as rows

    counted = rows.Counted.of()
    trained = rows.Trained.of(run)
    rows.draw(run, trained, counted)
    return {
        "compute": rows.compute(counted),
        "dynamic": rows.dynamic(trained, run),
        "better-on-digits": rows.better(trained),
        "better-than-vit": rows.better_than_vit(trained),
        "needs-mixing": rows.needs_mixing(trained),
        "operations": rows.operations(counted),
    }
