"""No attention among visual tokens, and visual features aligned with the attention inputs.

Method: headwise/attention/naavit.py; the network is headwise/models/saisa.py, its costs headwise/models/saisa_costs.py.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="saisa",
    title="SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency",
    authors="Yuan, Liu, Lu, Lin, He, Han, Sun",
    year=2025,
    arxiv="2502.02458",
    repository="icip-cas/SAISA",
    area="models",
    modules=(
        "headwise.models.saisa",
        "headwise.models._saisa_layers",
        "headwise.models.saisa_costs",
        "headwise.models.convert_naavit",
        "headwise.attention.naavit",
        "headwise.steering.naavit",
        "headwise.papers._saisa_setup",
        "headwise.papers._saisa_rows",
    ),
    changed=(
        "the noise of the pictures to compare went from 0.6 to 1.2, that of the pictures to name, and the steps from "
        "1,000 to 600, after SAISA alone had been trained for 180 steps and found 96 % of the shapes that occur twice"
    ),
    claims=(
        Claim(
            id="two-architectures",
            kind="untestable",
            claim=(
                "Multimodal Large Language Models (MLLMs) mainly fall into two architectures, each involving a "
                "trade-off between training and inference efficiency: embedding space alignment (e.g., LLaVA-1.5) is "
                "inefficient during inference, while cross-attention space alignment (e.g., Flamingo) is inefficient "
                "in training."
            ),
            criterion=(
                "a statement about published systems; how much data Flamingo's blocks need is a matter of its corpus "
                "and scale, none of which is here (what can be counted is in the row trade-off)"
            ),
        ),
        Claim(
            id="interactions",
            kind="claim",
            claim=(
                "In this paper, we compare these two architectures and identify the key factors for building efficient "
                "MLLMs. A primary difference between them lies in how attention is applied to visual tokens, "
                "particularly in their interactions with each other."
            ),
            criterion=(
                "trained networks: moving image tokens together with their positions changes the logits of text by "
                "more than 0.01 in LLaVA, where they attend to each other, and by at most 0.001 in NAAViT and SAISA"
            ),
            control="the same move without the positions, which changes all three",
        ),
        Claim(
            id="eliminates",
            kind="claim",
            claim=(
                "To investigate whether attention among visual tokens is necessary, we propose a new self-attention "
                "mechanism, NAAViT (No Attention Among Visual Tokens), which eliminates this type of attention."
            ),
            criterion=(
                "the trained NAAViT, every row computed: no gradient of the last hidden states of an image token "
                "reaches any other token; text rows computed alone agree to 1e-4"
            ),
            control="LLaVA's gradient",
        ),
        Claim(
            id="redundant",
            kind="claim",
            claim=("Our pilot experiment on LLaVA-1.5 shows that attention among visual tokens is highly redundant."),
            criterion=(
                "NAAViT, trained as long as LLaVA from the same start, is at most 2 points below it in naming shapes "
                "and in finding the shape that occurs twice"
            ),
            control="NAAViT put into the trained LLaVA; LLaVA that sees another picture",
        ),
        Claim(
            id="efficient",
            kind="claim",
            claim=(
                "Based on these insights, we introduce SAISA (Self-Attention Input Space Alignment), a novel "
                "architecture that enhance both training and inference efficiency."
            ),
            criterion=(
                "the small networks: SAISA needs fewer operations than LLaVA in a prefill, in a training step of its "
                "projectors and in one of everything, and fewer processor seconds for a training step here"
            ),
            control="NAAViT",
        ),
        Claim(
            id="both-blocks",
            kind="claim",
            claim=(
                "SAISA directly aligns visual features with the input spaces of NAAViT self-attention blocks, reducing "
                "computational overhead in both self-attention blocks and feed-forward networks (FFNs)."
            ),
            criterion=(
                "at LLaVA-1.5's sizes, 64 text and 576 image tokens: attention blocks (projections and scores) and "
                "feed-forward networks both need fewer operations than LLaVA's, the projectors of all layers counted "
                "with the attention blocks"
            ),
            control="NAAViT, whose feed-forward networks run on image tokens",
        ),
        Claim(
            id="inference",
            kind="claim",
            claim="Using the same configuration as LLaVA-1.5, SAISA reduces inference FLOPs by 66% ...",
            paper_figure="66 % (abstract; the number of text tokens is not given there)",
            criterion="at LLaVA-1.5's sizes, 64 text and 576 image tokens: a prefill needs at least 65.5 % less",
            control="40 and 128 text tokens; NAAViT",
        ),
        Claim(
            id="budget",
            kind="claim",
            claim="... and training budget by 26%, ...",
            paper_figure="26 % (abstract; what was counted is not given there)",
            criterion=(
                "558,000 captions for the projectors, then 665,000 conversations for everything, at LLaVA-1.5's sizes: "
                "at least 26 % fewer operations, vision tower and output head counted, with 32 and 256 text tokens"
            ),
            control="other lengths of the conversations",
        ),
        Claim(
            id="accuracy",
            kind="claim",
            claim="... while achieving superior performance in terms of accuracy.",
            criterion=(
                "after as many steps from the same start SAISA is more accurate than LLaVA, both tasks taken together"
            ),
            control="NAAViT",
        ),
        Claim(
            id="ablations",
            kind="untestable",
            claim=(
                "Comprehensive ablation studies further validate the effectiveness of SAISA across various LLMs and "
                "visual encoders."
            ),
            criterion=(
                "accuracy with several trained language models and vision encoders of full size; small ones of random "
                "weights differ in little but their names (that SAISA runs on Llama, Mistral, Qwen2 and Qwen3 with "
                "CLIP and SigLIP is tested)"
            ),
        ),
        Claim(
            id="trade-off",
            kind="check",
            claim="LLaVA pays in its prefill for image tokens, cross attention in parameters that start from nothing.",
            criterion=(
                "at LLaVA-1.5's sizes, 64 text and 576 image tokens: a prefill of LLaVA needs at least twice the "
                "operations of the same language model with a cross-attention block before every fourth layer, and "
                "those blocks have at least 50 times the parameters of LLaVA's projector"
            ),
            control="SAISA; a block before every layer, and before every eighth",
        ),
        Claim(
            id="naming",
            kind="check",
            claim="Where one place of the picture is enough, SAISA costs no accuracy and much less.",
            criterion=(
                "naming shapes: at most 2 points below LLaVA with at least 40 % fewer operations in a prefill of 16 "
                "image and 10 text tokens"
            ),
            control="NAAViT",
        ),
        Claim(
            id="counted",
            kind="check",
            claim="The closed formulas of operations are what a counter counts.",
            criterion="equal, for the prefill of each of the small networks",
        ),
        Claim(
            id="same-rows",
            kind="check",
            claim="Text rows computed alone are those of the whole, also in a padded batch and while generating.",
            criterion="logits of trained SAISA and NAAViT differ by at most 1e-4; generated texts are the same",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train the three networks from one start, test them on both tasks, and count."""
    from headwise.papers import _saisa_rows as rows
    from headwise.papers._saisa_setup import train_all

    made = train_all(run)
    rows.draw(run, made)
    return {
        "interactions": rows.interactions(made, run.seed),
        "eliminates": rows.eliminates(made, run.seed),
        "redundant": rows.redundant(made),
        "efficient": rows.efficient(made),
        "both-blocks": rows.both_blocks(),
        "inference": rows.inference(),
        "budget": rows.budget(),
        "accuracy": rows.accuracy(made),
        "trade-off": rows.trade_off(),
        "naming": rows.naming(made),
        "counted": rows.counted(made),
        "same-rows": rows.same_rows(made, run.seed),
    }
