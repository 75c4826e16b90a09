"""Channel-wise attention along the height and the width of a feature map.

Method: headwise/attention/efficient_local.py, put into networks by headwise/models/convert_efficient_local.py. The
networks of the run are small residual networks on canvases of handwritten digits.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="efficient-local-attention",
    title="ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
    authors="Xu, Wan",
    year=2024,
    arxiv="2403.01123",
    area="attention",
    modules=(
        "headwise.attention.efficient_local",
        "headwise.models.convert_efficient_local",
        "headwise.tasks.digit_canvases",
        "headwise.papers._ela_setup",
        "headwise.papers._ela_rows",
    ),
    claims=(
        Claim(
            id="attention-helps",
            kind="claim",
            claim=(
                "The attention mechanism has gained significant recognition in the field of computer vision due to its "
                "ability to effectively enhance the performance of deep neural networks."
            ),
            criterion=(
                "on the marked-band task, coordinate attention and ELA-B each raise the test accuracy of the network "
                "without a module by at least 0.15"
            ),
            control="squeeze-and-excitation, which sees no positions, and plain clutter, where none are needed",
        ),
        Claim(
            id="others-struggle",
            kind="claim",
            claim=(
                "However, existing methods often struggle to effectively utilize spatial information or, if they do, "
                "they come at the cost of reducing channel dimensions or increasing the complexity of neural networks."
            ),
            criterion=(
                "on the marked-band task squeeze-and-excitation gains less than 0.05 over no module, and coordinate "
                "attention, where it gains, has more than twice ELA-B's parameters and fewer channels inside than out"
            ),
            control="ELA-B: what it gains, its parameters and its channels",
        ),
        Claim(
            id="substantial",
            kind="claim",
            claim=(
                "In order to address these limitations, this paper introduces an Efficient Local Attention (ELA) "
                "method that achieves substantial performance improvements with a simple structure."
            ),
            criterion=(
                "on the marked-band task ELA-B is at least 0.15 above no module and at least 0.15 above "
                "squeeze-and-excitation, with less than 5 % more parameters"
            ),
            control="squeeze-and-excitation, of about as many parameters",
        ),
        Claim(
            id="coordinate-limits",
            kind="claim",
            claim=(
                "By analyzing the limitations of the Coordinate Attention method, we identify the lack of "
                "generalization ability in Batch Normalization, the adverse effects of dimension reduction on channel "
                "attention, and the complexity of attention generation process."
            ),
            criterion=(
                "on the marked-band task coordinate attention gains at least 0.01 of test accuracy when group norm "
                "takes the place of batch norm, and at least 0.01 when its reduction is left out, and it has more "
                "parameters than ELA-B"
            ),
            control="coordinate attention as published (reduction 8, inner width at least 8)",
            known=(
                "at this size neither hurts coordinate attention: means over three seeds 0.968 as published, "
                "0.962 with group norm, 0.969 without the reduction; only its parameters are more (2,152 against 720)"
            ),
        ),
        Claim(
            id="localises",
            kind="claim",
            claim=(
                "This approach enables accurate localization of regions of interest by efficiently encoding two 1D "
                "positional feature maps without the need for dimension reduction, while allowing for a lightweight "
                "implementation."
            ),
            criterion=(
                "on the marked-band task at least 0.6 of the evidence for the label (positive terms of its logit, each "
                "at one place of the last map) lies in the marked one of three bands with ELA-B, at least 0.15 more "
                "than without a module; as many channels inside as out, under 5 % more parameters"
            ),
            control="the same share without a module and with squeeze-and-excitation; by chance 1/3",
        ),
        Claim(
            id="four-versions",
            kind="check",
            claim=(
                "We carefully design three hyperparameters in ELA, resulting in four different versions: ELA-T, ELA-B, "
                "ELA-S, and ELA-L, to cater to the specific requirements of different visual tasks such as image "
                "classification, object detection and sementic segmentation."
            ),
            criterion=(
                "kernel, convolution groups and norm groups give four versions of exactly 7, 9, 42 and 58 parameters a "
                "channel; in ResNet-50 they add 105,728, 135,936, 634,368 and 876,032 to 25,557,032"
            ),
        ),
        Claim(
            id="integrates",
            kind="claim",
            claim=("ELA can be seamlessly integrated into deep CNN networks such as ResNet, MobileNet, and DeepLab."),
            criterion=(
                "one call puts it into every block of transformers' ResNet-50, MobileNetV2 and MobileNetV2 with the "
                "DeepLabV3+ head, at full size with random weights; shapes of outputs stay, every new parameter gets a "
                "gradient, and with all gates open (sigmoid 1) logits are the network's own to a share of 1e-4"
            ),
            control="how much logits change with the gates as they start, about 0.5 each",
        ),
        Claim(
            id="superior",
            kind="claim",
            claim=(
                "Extensive evaluations on the ImageNet, MSCOCO, and Pascal VOC datasets demonstrate the superiority of "
                "the proposed ELA module over current state-of-the-art methods in all three aforementioned visual "
                "tasks."
            ),
            criterion=(
                "in place of these data sets: on the marked-band task and on digits among clutter, ELA-B has a higher "
                "test accuracy than coordinate attention, squeeze-and-excitation and no module"
            ),
            control="coordinate attention, squeeze-and-excitation, no module, each trained alike",
            known=(
                "means over three seeds: on the marked band 0.958 against 0.968 of coordinate attention (0.42 of SE); "
                "among clutter ELA-B lowers accuracy (0.714, no module 0.800, SE 0.837): its two gates average a "
                "quarter in a young network"
            ),
        ),
        Claim(
            id="beside-coordinate",
            kind="check",
            claim="ELA-B is about as accurate as coordinate attention with at most half of its parameters.",
            criterion=(
                "on the marked-band task ELA-B is at most 0.05 below coordinate attention, with at most half of its "
                "parameters"
            ),
            control="coordinate attention, reduction 8",
        ),
        Claim(
            id="identities",
            kind="check",
            claim="ELA depends on no batch, treats both axes alike, and gates.",
            criterion=(
                "one image's result in training mode is the same alone and in a batch (1e-6); transposing an image "
                "transposes it (1e-6); gates with norm weight and bias 0 divide by 4 exactly"
            ),
            control="coordinate attention with batch norm depends on its batch in training",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train one small network with each module on two tasks, and put ELA into whole networks."""
    from headwise.papers import _ela_rows as rows
    from headwise.papers._ela_setup import train_all

    found = train_all(run)
    rows.draw(run, found)
    return {
        "attention-helps": rows.attention_helps(found),
        "others-struggle": rows.others_struggle(found),
        "substantial": rows.substantial(found),
        "coordinate-limits": rows.coordinate_limits(found),
        "localises": rows.localises(found, run),
        "four-versions": rows.four_versions(),
        "integrates": rows.integrates(run),
        "superior": rows.superior(found),
        "beside-coordinate": rows.beside_coordinate(found),
        "identities": rows.identities(run),
    }
