"""A language model's own attention decides where to look closer in a large 3D scene.

Method: headwise/models/scene_magnifier.py; its attention is headwise/attention/magnifier.py.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="lscenellm",
    title="LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences",
    authors="Zhi et al.",
    year=2025,
    venue="CVPR 2025",
    arxiv="2412.01292",
    repository="Hoyyyaard/LSceneLLM",
    area="models",
    modules=(
        "headwise.models.scene_magnifier",
        "headwise.models._scene_attention",
        "headwise.attention.magnifier",
        "headwise.ops.regions",
        "headwise.tasks.coarse_to_fine",
        "headwise.tasks.points",
        "headwise.papers._lscene_setup",
        "headwise.papers._lscene_rows",
    ),
    changed=(
        "after trials with seed 0 in which nothing was learned of the fine tokens: all arms go on from one model that "
        "has learned to look regions up by coarse tokens, which it does in its first layer, so that layer selects "
        "(before, layer 1 of a model from nothing); a glyph is three times as long, and what hides it in coarse tokens "
        "leaves colour and kind alone; the control of all fine tokens, which stays at chance from that start, goes on "
        "from the trained magnifier; criteria are as they were"
    ),
    claims=(
        Claim(
            id="prior",
            kind="untestable",
            claim=(
                "Research on 3D Vision-Language Models (3D-VLMs) is gaining increasing attention, which is crucial for "
                "developing embodied AI within 3D scenes, such as visual navigation and embodied question answering. "
                "Due to the high density of visual features, especially in large 3D scenes, accurately locating "
                "task-relevant visual information is challenging. Existing works attempt to segment all objects and "
                "consider their features as scene representations."
            ),
            criterion="remarks about a field and about other work; no comparison that this method could lose",
        ),
        Claim(
            id="redundant",
            kind="claim",
            claim=(
                "However, these task-agnostic object features include much redundant information and missing details "
                "for the task-relevant area."
            ),
            criterion=(
                "scenes of 16 regions: tokens made before the question (coarse ones alone) answer at least 80 % of the "
                "questions about kinds and at most 15 points above chance of those about details; and of all fine "
                "tokens, 15 of 16 regions' can be taken away after training for at most 5 points on details"
            ),
            control="the asked region's fine tokens taken away instead of all the others'",
        ),
        Claim(
            id="adaptive",
            kind="claim",
            claim=(
                "To tackle these problems, we propose LSceneLLM, an adaptive framework that automatically identifies "
                "task-relevant areas by leveraging LLM's visual preference for different tasks, followed by a "
                "plug-and-play scene magnifier module to capture fine-grained details in focused areas."
            ),
            criterion=(
                "the asked region is among the selected ones for at least 80 % of the questions about details, less "
                "than 35 % of the fine keys are read on average, and the share is at least 15 points above that of a "
                "random selection"
            ),
            control="a model trained with a random selection of the size that the selector takes",
        ),
        Claim(
            id="selector",
            kind="claim",
            claim=(
                "Specifically, a dense token selector examines the attention map of LLM to identify visual preferences "
                "for the instruction input."
            ),
            criterion=(
                "a region is selected at least 30 points more often for a question about it than for a question about "
                "another region of the same scene"
            ),
            control="the same difference under a random selection",
        ),
        Claim(
            id="magnifies",
            kind="claim",
            claim="It then magnifies fine-grained details of the focusing area.",
            criterion=(
                "questions about details, 16 regions: with the magnifier at least 30 points above a model of equal "
                "parameters and steps whose fine keys are never selected"
            ),
            control="coarse tokens alone, random selection, all fine tokens",
        ),
        Claim(
            id="fuses",
            kind="claim",
            claim=(
                "An adaptive self-attention module is leveraged to fuse the coarse-grained and selected fine-grained "
                "visual information."
            ),
            criterion=(
                "the trained magnifier loses at least 20 points on details when no fine key is selected and at least "
                "20 points on kinds when the coarse tokens are blank, and is at most 5 points below the model of "
                "coarse tokens alone on kinds"
            ),
            control="kinds without fine keys, details with blank coarse tokens",
        ),
        Claim(
            id="benchmark",
            kind="untestable",
            claim=(
                "To comprehensively evaluate the large scene understanding ability of 3D-VLMs, we further introduce a "
                "cross-room understanding benchmark, XR-Scene, which contains a series of large scene understanding "
                "tasks including XR-QA, XR-EmbodiedPlanning, and XR-SceneCaption."
            ),
            criterion=(
                "the benchmark is scans and annotations that are not shipped; a reader of its questions and generated "
                "scenes with its three formats are (headwise/tasks/cross_rooms.py)"
            ),
        ),
        Claim(
            id="surpasses",
            kind="claim",
            claim=(
                "Experiments show that our method surpasses existing methods on both large scene understanding and "
                "existing scene understanding benchmarks."
            ),
            criterion=(
                "questions about details: with 16 regions the magnifier is at least 30 points above coarse tokens "
                "alone, at least 15 above random selection and at most 5 below all fine tokens while it reads less "
                "than 35 % of the fine keys; with 4 regions at least 30 points above coarse tokens alone and above "
                "random selection"
            ),
            control="coarse tokens alone, random selection of the same size, all fine tokens; equal parameters",
        ),
        Claim(
            id="plug-in",
            kind="claim",
            claim=(
                "Plunging our scene magnifier module into the existing 3D-VLMs also brings significant improvement."
            ),
            criterion=(
                "put into the trained model of coarse tokens and tuned for 400 steps it answers at least 20 points "
                "more of the questions about details than the same model tuned as long without it"
            ),
            control="the same model tuned as long without a magnifier",
            known=(
                "400 steps at half the rate are few here: the gain is 24, 4 and 10 points, where 1,200 steps at the "
                "full rate, from the base of all arms, answer 99 % (row `magnifies`)"
            ),
        ),
        Claim(
            id="limit",
            kind="check",
            claim=(
                "Where nothing is selected it is the plain decoder bit for bit; the merge of two calls is one softmax."
            ),
            criterion="logits differ by 0; outputs by at most 1e-5",
        ),
        Claim(
            id="rooms",
            kind="check",
            claim="Fine tokens of several rooms of points show more of the objects than coarse tokens do.",
            criterion=(
                "tokens within 0.6 m of an object that are more than 75 % of its kind: the fine ones show a larger "
                "share of the objects"
            ),
            control="the coarse tokens of the same scenes",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train four ways of looking at fine tokens, plug a magnifier into the one without, and take parts away."""
    from headwise.papers import _lscene_rows as rows
    from headwise.papers._lscene_setup import train_all

    made = train_all(run)
    rows.draw(run, made)
    return {
        "redundant": rows.redundant(made),
        "adaptive": rows.adaptive(made),
        "selector": rows.selector(made),
        "magnifies": rows.magnifies(made),
        "fuses": rows.fuses(made),
        "surpasses": rows.surpasses(made),
        "plug-in": rows.plug_in(made),
        "limit": rows.limit(made),
        "rooms": rows.rooms(made),
    }
