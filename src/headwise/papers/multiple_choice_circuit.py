"""Heads that pick the letter of the right answer: which nodes write it, and what their queries and keys say.

Method: headwise/heads/categories.py and subspaces.py; on patching.py, attribution.py and masses.py, which other papers
share.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="multiple-choice-circuit",
    title=("Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla"),
    authors="Lieberum, Rahtz, Kramár, Nanda, Irving, Shah, Mikulik",
    year=2023,
    arxiv="2307.09458",
    area="heads",
    modules=(
        "headwise.heads.categories",
        "headwise.heads.subspaces",
        "headwise.heads.attribution",
        "headwise.heads.masses",
        "headwise.heads.patching",
        "headwise.heads._patch_runs",
        "headwise.heads.effects",
        "headwise.tasks.choice_questions",
        "headwise.papers._choice_setup",
        "headwise.papers._choice_rows",
    ),
    specimens=("choices", "tasks", "planted", "planted_llama"),
    claims=(
        Claim(
            id="promising",
            kind="untestable",
            claim=(
                "Circuit analysis is a promising technique for understanding the internal mechanisms of language "
                "models. However, existing analyses are done in small models far from the state of the art."
            ),
            criterion="a judgement of the field and a statement about its literature; no run can bear on it",
        ),
        Claim(
            id="case-study",
            kind="untestable",
            claim=(
                "To address this, we present a case study of circuit analysis in the 70B Chinchilla model, aiming to "
                "test the scalability of circuit analysis."
            ),
            criterion="Chinchilla was never released, and a model of 0.4 million parameters says nothing about 70B",
        ),
        Claim(
            id="techniques",
            kind="untestable",
            claim=(
                "We find that the existing techniques of logit attribution, attention pattern visualization, and "
                "activation patching naturally scale to Chinchilla,"
            ),
            criterion=(
                "needs Chinchilla; the three techniques are here for any decoder (heads.logit_attribution, "
                "heads.group_mass, heads.activation_patch) and are what the other rows use"
            ),
        ),
        Claim(
            id="output-nodes",
            kind="claim",
            claim=("allowing us to identify and categorize a small set of `output nodes' (attention heads and MLPs)."),
            paper_figure="about 45 nodes, 32 heads and 13 MLPs (public summaries, recalled)",
            criterion=(
                "with standard and with random labels: at most a quarter of the live nodes (heads that write anything, "
                "and MLPs), those with the largest direct effect on other prompts, keep at least 80 % of the right "
                "label's logit over the mean of all labels when every other node's direct path to the logits carries "
                "what it does on another question (final norm frozen), and at least twice what as many random live "
                "nodes keep (mean of 200 draws)"
            ),
            control="as many random live nodes",
        ),
        Claim(
            id="categorize",
            kind="claim",
            claim="[identify and] categorize a small set of `output nodes' (attention heads and MLPs).",
            paper_figure="correct letter, uniform, single letter and amplification heads, content gatherers (recalled)",
            criterion=(
                "with standard labels, at the printed thresholds, every head among the output nodes falls into one of "
                "the five categories, at least one into `correct letter`, and the same heads fall into the same "
                "categories on prompts that were not looked at"
            ),
            control="how many of the other live heads fall into a category",
            known=(
                "two of the four heads among the output nodes write less than a hundredth of the label's logit: in "
                "a model with two answering heads a quarter of the nodes is more than there is to categorize. Both "
                "heads that answer are `correct letter`, on every prompt set"
            ),
        ),
        Claim(
            id="mixed",
            kind="claim",
            claim=(
                "We further study the `correct letter' category of attention heads aiming to understand the semantics "
                "of their features, with mixed results."
            ),
            criterion=(
                "three directions each, one part at a time: of queries, keys and values of the correct letter heads "
                "at least one part keeps 95 % of the accuracy on standard labels, and at least one part keeps less "
                "than 95 % on random labels"
            ),
            control="as many random directions",
        ),
        Claim(
            id="compress",
            kind="claim",
            claim=(
                "For normal multiple-choice question answers, we significantly compress the query, key and value "
                "subspaces of the head without loss of performance when operating on the answer labels for "
                "multiple-choice questions,"
            ),
            paper_figure="three dimensions suffice (recalled)",
            criterion=(
                "standard labels, held-out prompts: queries (last token), keys and values (at the labels) of all "
                "correct letter heads, all three projected on 3 of 16 directions found on other prompts, the rest at "
                "its mean: at least 95 % of the accuracy among the labels is kept, and at least 10 points more than "
                "with random directions (mean of 20 draws)"
            ),
            control="3 random directions around the same means",
            known=(
                "these heads find the option by its word: queries and keys must tell some ninety words apart, which "
                "takes about 8 of 16 directions. Values, which say the letter alone, do fit in 3 (row `mixed`)"
            ),
        ),
        Claim(
            id="nth-item",
            kind="claim",
            claim=(
                "and we show that the query and key subspaces represent an `Nth item in an enumeration' feature to at "
                "least some extent."
            ),
            criterion=(
                "standard labels: with the query of another question whose right option has the same index (other "
                "words), the correct letter heads' attention among the labels puts at least 0.05 more than chance "
                "(1/4) on the label of that index; the 95 % interval over prompts excludes 0"
            ),
            control="queries of questions whose right option has another index",
            known=(
                "in these prompts the label follows the option's text, so the key at the label can hold the word "
                "itself, and the model never needs the item's number; the paper's labels come before their texts"
            ),
        ),
        Claim(
            id="partial",
            kind="claim",
            claim=(
                "However, when we attempt to use this explanation to understand the heads' behaviour on a more "
                "general distribution including randomized answer labels, we find that it is only a partial "
                "explanation,"
            ),
            criterion=(
                "random labels: what the index alone explains of the correct letter heads' attention to the right "
                "label (mass above chance with the query of another question with that index, over mass above chance "
                "with its own) is at least 10 % and at most 80 %"
            ),
            control="the same share on standard labels",
            known=(
                "the index explains nothing of these heads (row `nth-item`), so it is no partial explanation but a "
                "wrong one here"
            ),
        ),
        Claim(
            id="more",
            kind="claim",
            claim=(
                "suggesting there is more to learn about the operation of `correct letter' heads on multiple choice "
                "question answering."
            ),
            criterion=(
                "random labels: with queries and keys of the correct letter heads reduced to what the index of the "
                "right option and of each label decides (class means, 3 directions), accuracy among the labels falls "
                "by at least 10 points: the explanation leaves something out"
            ),
            control="the same reduction at the rank of the head (all 16 directions): nothing changes",
        ),
        Claim(
            id="able",
            kind="check",
            claim="The model names the label of the asked option, wherever it stands and whatever it is called.",
            criterion="at least 90 % right of all tokens, with random letters and with standard ones, four options",
            control="chance with option texts taken out; the model from which it was trained on",
        ),
        Claim(
            id="attribution",
            kind="check",
            claim="Heads, MLPs and the rest add up to the logits.",
            criterion="largest difference below 1e-4 of the largest logit, in four models",
        ),
        Claim(
            id="correct-letter",
            kind="check",
            claim="There is a head that looks at the right label and not at the wrong ones.",
            criterion=(
                "with standard and with random labels, the best head's mass on the right label is at least 3 times "
                "that on each wrong one on prompts answered right, and, where at least 8 prompts are answered wrong, "
                "the same for the label that the model then says"
            ),
            control="the best live head outside the category, in the same layer",
        ),
        Claim(
            id="ablation",
            kind="check",
            claim="Without its two best heads the model no longer knows the letter.",
            criterion=(
                "outputs of the two best correct letter heads taken from other questions: accuracy among the labels "
                "falls by at least 30 points; with pairs of other live heads of the same layers by less than 15 (mean)"
            ),
            control="pairs of other live heads of the same layers (all, or 50 draws)",
        ),
        Claim(
            id="rank-three",
            kind="check",
            claim="Four labels need three directions, and one is too few.",
            paper_figure="four labels span three centred dimensions, which suffice (recalled)",
            criterion=(
                "standard labels: queries and keys of the correct letter heads on 3 directions keep at least 90 % of "
                "the accuracy, and on 1 less than 90 %"
            ),
            control="as many random directions",
            known=(
                "as for `compress`: the asked word and not the index of its option decides over the queries, and words "
                "take about 8 directions; the three in which queries and keys meet keep only half as well"
            ),
        ),
        Claim(
            id="mutations",
            kind="check",
            claim="The head follows the text, whatever its label is called.",
            paper_figure="random letters, digits, other orders (recalled)",
            criterion=(
                "the best head's mass on the right label is at least 3 times that on each wrong one with the letters "
                "A to D in another order, with random letters and with digits, which never were labels in training"
            ),
            control="with the texts taken out, the ratio",
            known=(
                "other orders and random letters, yes; digits never stood for labels in training, where they belong to "
                "sums, and no head notes at a digit which text stands before it"
            ),
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Ask the shipped model multiple-choice questions; find, sort, remove and project the heads that answer."""
    from headwise.papers import _choice_rows as rows
    from headwise.papers._choice_setup import Study

    study = Study.of(run)
    rows.draw(run, study)
    return {
        "output-nodes": rows.output_nodes(study),
        "categorize": rows.categorize(study),
        "mixed": rows.mixed(study),
        "compress": rows.compress(study),
        "nth-item": rows.nth_item(study),
        "partial": rows.partial(study),
        "more": rows.more(study),
        "able": rows.able(study),
        "attribution": rows.attribution(study),
        "correct-letter": rows.correct_letter(study),
        "ablation": rows.ablation(study),
        "rank-three": rows.rank_three(study),
        "mutations": rows.mutations(study),
    }
