"""Find the heads that depend on the image, and amplify them.

Method: headwise/steering/vision_head_reinforcement.py, headwise/heads/vision.py. The model is small and sees
well; where a picture breaks what usually follows what, it says what usually follows.
"""

from collections.abc import Mapping

from headwise.papers import _vision_heads_rows as rows_of
from headwise.papers._vision_heads_setup import subject
from headwise.papers.record import Claim, Paper
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, lines

PAPER = Paper(
    slug="vision-aware-head-reinforcement",
    title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
    authors="He, Zhu, Guo, Fang, Hua, Jia, Tang, Chua, Wang",
    year=2025,
    venue="ACL 2025",
    arxiv="2412.13949",
    repository="jinghan1he/VHR",
    area="steering",
    modules=(
        "headwise.steering.vision_head_reinforcement",
        "headwise.heads.vision",
        "headwise.hf.layerwise",
        "headwise.tasks.captions",
        "headwise.tasks.hallucination",
        "headwise.specimens.vision_language",
        "headwise.papers._vision_heads_rows",
        "headwise.papers._vision_heads_setup",
    ),
    specimens=("vision-language",),
    claims=(
        Claim(
            id="progress",
            kind="untestable",
            claim=(
                "Large vision-language models (LVLMs) have made substantial progress in integrating large language "
                "models (LLMs) with visual inputs, enabling advanced multimodal reasoning."
            ),
            criterion="a statement about the field, which no run of this paper's method could contradict",
        ),
        Claim(
            id="hallucination",
            kind="claim",
            claim=(
                "Despite their success, a persistent challenge is hallucination-where generated text fails to "
                "accurately reflect visual content-undermining both accuracy and reliability."
            ),
            criterion=(
                "greedy captions name at least 0.4 shapes a caption (of four) more that are not there on "
                "counterfactual pictures than on ordinary ones; the 95 % interval over pictures excludes 0.4"
            ),
            control="ordinary pictures, which follow the prior; how many wrong words are the typical ones",
        ),
        Claim(
            id="existing",
            kind="untestable",
            claim=(
                "Existing methods focus on alignment training or decoding refinements but primarily address "
                "symptoms at the generation stage without probing the underlying causes."
            ),
            criterion="a judgement of other papers, which no run could contradict",
        ),
        Claim(
            id="metric",
            kind="claim",
            claim=(
                "Specifically, we introduce Vision-aware Head Divergence (VHD), a metric that quantifies the "
                "sensitivity of attention head outputs to visual context."
            ),
            criterion=(
                "T-VHD (k = 2) where a shape is about to be said, which only the picture tells, is at least 1.3 times "
                "that where a comma is, which it does not; the 95 % interval over pictures of the ratio excludes 1.3"
            ),
            control="the same over the norm of each head's output; a picture without shapes",
        ),
        Claim(
            id="aware-heads",
            kind="claim",
            claim=(
                "Based on this, our findings reveal the presence of vision-aware attention heads that are more "
                "attuned to visual information;"
            ),
            criterion=(
                "hiding the image tokens from the two heads of each layer with the largest mean VHD (on other "
                "pictures) costs more accuracy on counterfactual pictures than hiding them from as many random other "
                "heads of the same layers; the 95 % paired interval over pictures excludes 0"
            ),
            control="12 sets of as many random other heads of each layer",
        ),
        Claim(
            id="prior",
            kind="claim",
            claim=(
                "however, the model's overreliance on its prior language patterns is closely related to hallucinations."
            ),
            paper_figure="T-VHD of hallucinated words is lower than of right ones (figure of the paper)",
            criterion=(
                "on counterfactual pictures right words have a larger T-VHD than typical ones that are not there: the "
                "AUC exceeds 0.5, and so does its 95 % interval over pictures"
            ),
            control="the words said so far hidden from all heads: how often the typical word is said then",
        ),
        Claim(
            id="mitigates",
            kind="claim",
            claim=(
                "Building on these insights, we propose Vision-aware Head Reinforcement (VHR), a training-free "
                "approach to mitigate hallucination by enhancing the role of vision-aware attention heads."
            ),
            paper_figure=(
                "CHAIR_s 49.68 to 33.32 (LLaVA-1.5), 45.32 to 37.76 (InstructBLIP), 29.08 to 24.96 (LLaVA-NeXT); one "
                "choice of heads for all 44.72, no outlier rule 36.88; POPE F1 84.98 to 85.47 (tables of the paper)"
            ),
            criterion=(
                "at alpha 2 the typical word that is not there is said at least 0.10 less often, and less often than "
                "with the same factor on as many random heads of the same layers, drawn for every picture; both "
                "95 % paired intervals over 1,024 pictures exclude 0"
            ),
            control=(
                "random heads of the same layers, the other half of the heads, all heads, no outlier rule, one choice "
                "for all pictures; accuracy on ordinary pictures; yes-or-no questions"
            ),
        ),
        Claim(
            id="superior",
            kind="claim",
            claim=(
                "Extensive experiments demonstrate that our method achieves superior performance compared to "
                "state-of-the-art approaches in mitigating hallucinations,"
            ),
            paper_figure="CHAIR_s 33.32 on LLaVA-1.5, below every method that is compared (table of the paper)",
            criterion=(
                "greedy captions of counterfactual pictures name fewer shapes that are not there under VHR than under "
                "contrastive decoding with a distorted picture and with none; the 95 % paired interval over pictures "
                "against the better of the two excludes 0"
            ),
            control="plain decoding; all heads scaled alike",
        ),
        Claim(
            id="overhead",
            kind="claim",
            claim="while maintaining high efficiency with negligible additional time overhead.",
            criterion=(
                "reading 576 image tokens and 41 words and writing 64 takes at most 1.10 times the processor time of "
                "plain writing (median of 5 pairs, random weights); the 95 % interval of the median excludes 1.10"
            ),
            control="contrastive decoding, which runs the model on the text alone as well",
        ),
        Claim(
            id="one-forward",
            kind="check",
            claim="Heads chosen layer by layer inside one forward are those of separate forwards for every layer.",
            criterion=(
                "on 64 pictures every choice is the same, logits agree to 1e-5 relative, and alpha 1 is bit-identical "
                "to the plain model"
            ),
        ),
        Claim(
            id="projection",
            kind="check",
            claim="Scaling a head's output is scaling its columns of the output projection.",
            criterion="logits agree to 1e-5 relative",
        ),
    ),
)


SHORT = {
    "no outlier rule": "no outlier\nrule",
    "random heads": "random\nheads",
    "the other half": "other\nhalf",
    "one choice for all": "one\nchoice",
    "all heads": "all\nheads",
    "contrast with a distorted picture": "contrast:\ndistorted",
    "contrast with no picture": "contrast:\nno picture",
}


def reproduce(run: Run) -> dict[str, Measured]:
    """Find the heads that depend on the picture, amplify them, and amplify others in their place."""
    one = subject(run)
    rows = {
        "hallucination": rows_of.hallucination(run, one),
        "metric": rows_of.metric(run, one),
        "aware-heads": rows_of.aware(run, one),
        "prior": rows_of.prior(run, one),
    }
    rows["mitigates"], arms = rows_of.mitigates(run, one)
    rows["superior"], captions = rows_of.superior(run, one)
    rows |= rows_of.identities(run, one)
    swept = rows_of.sweep(run, one)
    rows["overhead"] = rows_of.overhead(run)
    _draw(run, arms, captions, swept)
    return rows


def _draw(
    run: Run,
    arms: Mapping[str, Mapping[str, float]],
    captions: Mapping[str, float],
    swept: Mapping[str, Mapping[str, list[float]]],
) -> None:
    path = run.out / f"{PAPER.slug}-figure.png"
    with figure(path, 3) as (left, middle, right):
        names = [SHORT.get(name, name) for name in arms]
        series = {key: [arm[key] for arm in arms.values()] for key in ("typical", "accuracy")}
        bars(left, names, series, y="share of words, counterfactual", title="Which heads to amplify")
        left.tick_params(axis="x", labelsize=7)
        left.legend(loc="upper center", ncols=2)
        left.set_ylim(0, 0.65)
        kinds = {"typical": "typical, not there", "ordinary": "right, ordinary"}
        curves = {f"{name}: {label}": both[key] for key, label in kinds.items() for name, both in swept.items()}
        lines(middle, rows_of.ALPHAS, curves, x="alpha", y="share of words", title="How strongly")
        middle.legend(fontsize=7)
        bars(
            right,
            [SHORT.get(name, name) for name in captions],
            {"CHAIR_i": list(captions.values())},
            y="named shapes that are not there",
            title="Greedy captions",
        )
        right.tick_params(axis="x", labelsize=7)
    run.figures.append(path)
