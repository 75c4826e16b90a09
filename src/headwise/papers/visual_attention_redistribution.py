"""Move attention from visual sinks to the image tokens that matter.

Method: headwise/steering/visual_attention_redistribution.py; sinks are found by headwise/heads/sinks.py.
"""

from collections.abc import Mapping

from headwise.papers import _visual_redistribution_rows as rows_of
from headwise.papers._picture_runs import Scores
from headwise.papers.record import Claim, Paper
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure

PAPER = Paper(
    slug="visual-attention-redistribution",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    authors="Kang et al.",
    year=2025,
    venue="ICLR 2025",
    arxiv="2503.03321",
    repository="seilk/VisAttnSink",
    area="steering",
    modules=(
        "headwise.steering.visual_attention_redistribution",
        "headwise.steering._images",
        "headwise.heads.sinks",
        "headwise.specimens.visual_sink",
        "headwise.papers._visual_redistribution_rows",
        "headwise.papers._picture_runs",
    ),
    specimens=("vision-language",),
    changed=(
        "in an implanted sink the massive dimension holds 0.98 of the row's norm instead of 0.9, at which 6 of 1,536 "
        "sinks fell below the threshold in layers 2 and 3; the check `definition` takes the sinks of its reference "
        "from the model's states instead of from where they were put"
    ),
    claims=(
        Claim(
            id="tendency",
            kind="claim",
            claim=(
                "However, recent findings indicate that LMMs have an extraordinary tendency to consistently allocate "
                "high attention weights to specific visual tokens, even when these tokens are irrelevant to the "
                "corresponding text."
            ),
            criterion=(
                "in the model as it was trained, rows behind the picture give one image cell that is empty in every "
                "picture more attention than a cell with a shape to be named, mean over heads and layers; the 95 % "
                "interval over 512 unseen pictures excludes 0"
            ),
            control="the cell is the better of two, chosen on 512 other pictures",
            known=(
                "the model gives a cell that is empty in every picture about a third of what it gives a shape: no "
                "image token is looked at whatever the text says, as happens in large models"
            ),
        ),
        Claim(
            id="massive",
            kind="claim",
            claim=(
                "Our findings show that this behavior arises due to the massive activation of certain hidden state "
                "dimensions, which resembles the attention sink found in language models."
            ),
            criterion=(
                "in the model as it was trained some image token has max |x| / RMS(x) above three quarters of its "
                "bound sqrt(hidden size) in the input of layer 1 or later (the paper's 20 is out of reach below a "
                "hidden size of 400)"
            ),
            control="the same figure in a copy into which two visual sinks were implanted",
            known=(
                "the largest activation of an image token is 3.8 to 5.6 times the root mean square of its row, of a "
                "bound of 8: massive activations do not come up in minutes of training at a hidden size of 64"
            ),
        ),
        Claim(
            id="removable",
            kind="claim",
            claim=(
                "In particular, our analysis reveals that removing the irrelevant visual sink tokens does not impact "
                "model performance, despite receiving high attention weights."
            ),
            criterion=(
                "in a copy of the model with two implanted visual sinks, a sink gets at least twice the attention of "
                "another image token; hiding both lowers the accuracy of the next shape on 1,024 counterfactual "
                "pictures by less than 1 point, and hiding two random cells with shapes by more than 10 points (95 % "
                "paired intervals)"
            ),
            control="two random cells with shapes; two random empty cells; the model without sinks",
            known=(
                "hiding the two sinks is a gain of 16 to 31 points in all three models, but hiding two shapes costs "
                "13, 8 and 11 points, on both sides of the 10 that were asked for: with 17 to 26 % right under the "
                "sinks there is little to lose"
            ),
        ),
        Claim(
            id="focus",
            kind="claim",
            claim=(
                "Consequently, we recycle the attention to these tokens as surplus resources, redistributing the "
                "attention budget to enhance focus on the image."
            ),
            criterion=(
                "with sinks implanted, VAR raises the attention that rows behind the picture give to the other image "
                "tokens, mean over the heads of layers 1 to 3; the 95 % interval over pictures excludes 0"
            ),
            control="transfer 0; and how much of the rise falls on cells with shapes",
        ),
        Claim(
            id="image-centric",
            kind="claim",
            claim=(
                "To achieve this, we introduce Visual Attention Redistribution (VAR), a method that redistributes "
                "attention in image-centric heads, which we identify as innately focusing on visual information."
            ),
            criterion=(
                "with sinks implanted, VAR in the heads and rows that its rule calls image-centric gives a higher "
                "accuracy of the next shape on 1,024 counterfactual pictures than VAR in as many random heads of the "
                "same layer and row, and than VAR in all heads; both 95 % paired intervals exclude 0"
            ),
            control="as many random heads of the layer in every row; all heads",
            known=(
                "the rule leaves out heads in which sinks hold more than half of the attention on the image; an "
                "implanted sink gets 12 to 16 times the attention of another image token, so that the heads it "
                "hurts most are left out, and random heads (by 3 to 5 points) and all heads (by 8 to 16) gain more"
            ),
        ),
        Claim(
            id="improves",
            kind="claim",
            claim=(
                "VAR can be seamlessly applied across different LMMs to improve performance on a wide range of tasks, "
                "including general vision-language tasks, visual hallucination tasks, and vision-centric tasks, all "
                "without the need for additional training, models, or inference steps."
            ),
            criterion=(
                "in three models (training seeds) with implanted sinks VAR raises the share of questions answered "
                "right, lowers that of typical successors said that are not there, and raises that of shapes named "
                "right; the 95 % paired interval over 1,024 pictures of the smallest gain excludes 0"
            ),
            control="the accuracy on ordinary pictures under VAR, printed beside it",
            known=(
                "more shapes are named right and fewer typical successors said in all three models (each interval "
                "excludes 0), but questions move by 0.0, +1.2 and -0.1 points"
            ),
        ),
        Claim(
            id="effective",
            kind="claim",
            claim=(
                "Experimental results demonstrate that VAR enables LMMs to process visual information more effectively "
                "by adjusting their internal attention mechanisms, offering a new direction to enhancing the "
                "multimodal capabilities of LMMs."
            ),
            criterion=(
                "VAR gives back at least half of the accuracy of the next shape that the implanted sinks cost on 1,024 "
                "counterfactual pictures; the 95 % paired interval of the difference excludes 0"
            ),
            control=(
                "the same share taken from the sinks in all heads and given to all keys in proportion; random heads; "
                "all heads; transfer 0.4, as in the authors' code"
            ),
            known=(
                "VAR moves attention only in heads in which the sinks hold less than half of the attention on the "
                "image, and gives back 5 to 11 % of the loss; the same share moved in all heads gives back 63 to 76 "
                "%"
            ),
        ),
        Claim(
            id="detector",
            kind="check",
            claim="Sinks are told by massive activations: exactly the implanted ones are found.",
            criterion="precision and recall are 1 over 256 pictures and layers 1 to 3",
            control="the model as it was trained",
        ),
        Claim(
            id="no-op",
            kind="check",
            claim="Where there is no sink nothing is changed, and VAR says so; transfer 0 changes nothing.",
            criterion=(
                "logits of the model as it was trained are the same bit for bit, with one warning; so are those of the "
                "model with sinks at transfer 0"
            ),
            control="the model with sinks",
        ),
        Claim(
            id="definition",
            kind="check",
            claim="The edit by masses of groups is the rule on whole rows of weights.",
            criterion="logits in double precision differ by less than 1e-5 relative on 32 pictures",
        ),
    ),
)


def reproduce(run: Run) -> dict[str, Measured]:
    """Find, hide and drain sinks: none in the model as it was trained, two in a copy into which they were put."""
    run.log("implanting sinks")
    its = rows_of.subject(run)
    rows = {"tendency": rows_of.tendency(run, its)}
    rows["massive"], rows["detector"] = rows_of.massive(run, its)
    rows["no-op"], rows["definition"] = rows_of.nothing(its), rows_of.definition(its)
    rows["focus"] = rows_of.focus(run, its)
    found = rows_of.runs(run, its)
    run.log("hiding cells")
    rows["removable"] = rows_of.removable(run, its, found["sinks implanted"])
    rows["image-centric"] = rows_of.centric(run, found)
    rows["improves"] = rows_of.improves(run, its, found)
    rows["effective"] = rows_of.restores(run, found)
    _draw(run, found)
    return rows


def _draw(run: Run, found: Mapping[str, Scores]) -> None:
    path = run.out / f"{PAPER.slug}-figure.png"
    names = {"no sinks": "no sinks", "sinks implanted": "sinks"} | {
        name: name.replace(", ", ",\n").replace(" heads", "\nheads").replace("to all keys", "to all\nkeys")
        for name in list(found)[2:]
    }
    with figure(path, 2, width=5.4) as (left, right):
        for axes, what, title in (
            (left, "accuracy", "Right next shapes"),
            (right, "typical", "Typical successors said"),
        ):
            values = [100 * float(getattr(found[name], what).mean()) for name in names]
            errors = [
                196 * float(getattr(found[name], what).std()) / len(getattr(found[name], what)) ** 0.5 for name in names
            ]
            bars(axes, list(names.values()), {what: values}, error={what: errors}, y="% of shapes 2 to 4", title=title)
            axes.tick_params(axis="x", labelsize=7)
    run.figures.append(path)
