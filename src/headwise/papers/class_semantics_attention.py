"""Attention by class semantics for finding actions in video.

Method: headwise/attention/class_semantics.py, inside headwise/models/boundary_matching.py. What a recogniser says of
each class over time weighs the features in which actions are looked for.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="class-semantics-attention",
    title="Class Semantics-based Attention for Action Detection",
    authors="Sridhar, Quader, Muralidharan, Li, Dai, Lu",
    year=2021,
    venue="ICCV 2021, pp. 13739-13748",
    arxiv="2109.02613",
    area="attention",
    modules=(
        "headwise.attention.class_semantics",
        "headwise.models.boundary_matching",
        "headwise.ops.boundary_matching",
        "headwise.tasks.temporal_detection",
        "headwise.tasks.untrimmed_videos",
        "headwise.papers._class_semantics_setup",
        "headwise.papers._class_semantics_rows",
    ),
    claims=(
        Claim(
            id="structure",
            kind="untestable",
            claim=(
                "Action localization networks are often structured as a feature encoder sub-network and a localization "
                "sub-network, where the feature encoder learns to transform an input video to features that are useful "
                "for the localization sub-network to generate reliable action proposals."
            ),
            criterion="a remark about how such networks are built; BMN, built so, is models.BoundaryMatchingNetwork",
        ),
        Claim(
            id="prior-approaches",
            kind="untestable",
            claim=(
                "While some of the encoded features may be more useful for generating action proposals, prior action "
                "localization approaches do not include any attention mechanism that enables the localization "
                "sub-network to attend more to the more important features."
            ),
            criterion="a remark about the literature before 2021",
        ),
        Claim(
            id="semantics",
            kind="claim",
            claim=(
                "CSA learns from the temporal distribution of semantics of action classes present in an input video to "
                "find the importance scores of the encoded features, which are used to provide attention to the more "
                "useful encoded features."
            ),
            criterion=(
                "the trained BMN with CSA, 150 test videos: with the weights computed from another video's class "
                "scores and with those from its own scores in another order of time, the average precision (IoU 0.3 "
                "to 0.7) falls by at least 0.02 each"
            ),
            control="the same weights from the video's own scores",
            known=(
                "weights from another video's scores cost 0.05, 0.04 and 0.02, but those from its own scores in other "
                "order 0.019, 0.017 and 0.005: most of the weights is which classes a video has, less is when"
            ),
        ),
        Claim(
            id="gain",
            kind="claim",
            claim=(
                "We demonstrate on two popular action detection datasets that incorporating our novel attention "
                "mechanism provides considerable performance gains on competitive action detection models "
                "(e.g., around 6.2% improvement over BMN action detection baseline to obtain 47.5% mAP on the "
                "THUMOS-14 dataset),"
            ),
            paper_figure="THUMOS-14: 47.5 mAP, about 6.2 above BMN (abstract)",
            criterion=(
                "drawn videos of class scores, 800 steps: average precision over IoU 0.3 to 0.7 of BMN with CSA is at "
                "least 0.02 above BMN's, and above that with the same attention computed from the features (as many "
                "parameters)"
            ),
            control="BMN; BMN with the same attention reading the features",
        ),
        Claim(
            id="state-of-the-art",
            kind="untestable",
            claim="and a new state-of-the-art of 36.25% mAP on the ActivityNet v1.3 dataset.",
            paper_figure="36.25 average mAP (abstract); BMN without it reaches 34.2 to 36.4 in later code (OpenTAD)",
            criterion=(
                "needs the features of 20,000 videos; BoundaryMatchingConfig's defaults are the sizes for them, and "
                "ActivityNetAnnotations, proposals_of, soft_nms and average_precision the data and protocol"
            ),
        ),
        Claim(
            id="challenge",
            kind="untestable",
            claim=(
                "Further, the CSA localization model family which includes BMN-CSA, was part of the second-placed "
                "submission at the 2021 ActivityNet action localization challenge."
            ),
            paper_figure="44.11 average mAP of the ensemble (page of the challenge)",
            criterion="the outcome of a challenge that is over",
        ),
        Claim(
            id="over-self-attention",
            kind="claim",
            claim=(
                "Our attention mechanism outperforms prior self-attention modules such as the squeeze-and-excitation "
                "in action detection task."
            ),
            criterion=(
                "as above, BMN with CSA is at least 0.02 above BMN with squeeze-and-excitation (which has no more "
                "parameters)"
            ),
            control="BMN with squeeze-and-excitation",
        ),
        Claim(
            id="complementary",
            kind="claim",
            claim=(
                "We also observe that our attention mechanism is complementary to such self-attention modules in that "
                "performance improvements are seen when both are used together."
            ),
            criterion="as above, BMN with both is at least 0.005 above BMN with CSA alone and above BMN with SE alone",
            control="BMN with one of the two",
        ),
        Claim(
            id="identities",
            kind="check",
            claim="CSA at rest changes nothing, and reading the features by channel it is squeeze-and-excitation.",
            criterion=(
                "with its last layers at 0 the attended features are the features bit for bit, and with the channel "
                "branch alone and the features as source it equals squeeze-and-excitation, written out, to 1e-6"
            ),
        ),
        Claim(
            id="network",
            kind="check",
            claim="The network is BMN, whose convolution over samples may be taken before the sampling.",
            paper_figure="4,978,564 parameters with 400 input channels (counted in the official code)",
            criterion=(
                "4,978,564 parameters at the official sizes; at 24 steps and official widths the samples of every "
                "segment convolved in the official order differ by at most 1e-4 of the largest"
            ),
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train BMN with each attention on drawn videos and compare what they find."""
    from headwise.papers import _class_semantics_rows as rows
    from headwise.papers._class_semantics_setup import results

    found, test = results(run)
    rows.draw(run, found, test)
    return {
        "semantics": rows.semantics(found, test),
        "gain": rows.gain(found),
        "over-self-attention": rows.over_self_attention(found),
        "complementary": rows.complementary(found),
        "identities": rows.identities(),
        "network": rows.network_is_bmn(),
    }
