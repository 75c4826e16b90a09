"""A few heads copy from the context: find them by where they look while the model copies.

Method: headwise/heads/retrieval.py. Removing these heads, and no others, breaks retrieval.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="retrieval-heads",
    title="Retrieval Head Mechanistically Explains Long-Context Factuality",
    authors="Wu, Wang, Xiao, Peng, Fu",
    year=2024,
    venue="ICLR 2025",
    arxiv="2404.15574",
    repository="nightdessert/Retrieval_Head",
    area="heads",
    modules=(
        "headwise.heads.retrieval",
        "headwise.heads.decoding",
        "headwise.heads.knockout",
        "headwise.papers._retrieval_setup",
        "headwise.papers._retrieval_rows",
    ),
    specimens=("planted", "planted_llama", "tasks", "text"),
    claims=(
        Claim(
            id="responsible",
            kind="claim",
            claim=(
                "Our systematic investigation across a wide spectrum of models reveals that a special type of "
                "attention heads are largely responsible for retrieving information, which we dub retrieval "
                "heads."
            ),
            paper_figure="masking the top 30 heads of Llama-2-7B ruins needle retrieval (official README)",
            criterion=(
                "on held-out needles, in every shipped model that retrieves (at least 90 % right of the answer tokens "
                "that it cannot guess with the answer cut out of the prompt; only these count in every row), removing "
                "all retrieval heads (0.1 or more, the paper's bound, on other needles; output zeroed) takes away at "
                "least 80 % of what was right, and more than twice what the same number of other heads of the same "
                "layers takes away (mean of 200 draws, or all subsets; a layer with fewer such heads gives all it has)"
            ),
            control="layer-matched live heads with a score below 0.1",
        ),
        Claim(
            id="universal",
            kind="claim",
            claim=(
                "We identify intriguing properties of retrieval heads: (1) universal: all the explored models "
                "with long-context capability have a set of retrieval heads;"
            ),
            paper_figure="seven model files published with the official code, all with heads of 0.1 or more",
            criterion=(
                "every shipped trained model that retrieves (at least 90 % right on needles in its longest trained "
                "context) has at least one head with a mean score of 0.1 or more, and at least two different such "
                "models exist"
            ),
            control="the same architectures with random weights (teacher-forced scores): no head reaches 0.1",
        ),
        Claim(
            id="sparse",
            kind="claim",
            claim="(2) sparse: only a small portion (less than 5%) of the attention heads are retrieval.",
            paper_figure=(
                "heads of 0.1 or more in the published score files: Llama-2-7B-80K 33/1024, Llama-2-13B-64K "
                "33/1600, Mistral-7B-v0.2 43/1024, Qwen1.5-14B 61/1600, Qwen1.5-14B-Chat 68/1600, Yi-6B-200K "
                "53/1024, Mixtral-8x7B 63/1024: two of seven lie above 5 %"
            ),
            criterion="in every shipped model that retrieves, fewer than 5 % of the heads score 0.1 or more",
            control="the smallest share that one head can be",
            known=(
                "models of 24 and 32 heads cannot show it: one head is already 4.2 % and 3.1 % of them, and both have "
                "more than one; two of the seven published score files lie above 5 % as well"
            ),
        ),
        Claim(
            id="intrinsic",
            kind="claim",
            claim="(3) intrinsic: retrieval heads already exist in models pretrained with short context.",
            paper_figure=(
                "Llama-2-7B (4K) and its 80K extension have correlated score maps (figure of the paper, recalled)"
            ),
            criterion=(
                "every shipped model that retrieves in its longest trained context, and never saw a longer one, has "
                "at least one head with a score of 0.5 or more"
            ),
            control="the same architecture before training: no head reaches 0.1 (teacher-forced scores)",
        ),
        Claim(
            id="extension",
            kind="claim",
            claim=(
                "When extending the context length by continual pretraining, it is still the same set of heads "
                "that perform information retrieval."
            ),
            paper_figure="the same heads before and after extension and chat tuning (figure of the paper, recalled)",
            criterion=(
                "after continued training on contexts of twice its longest one, all heads free to take part, a model "
                "then retrieves there (at least 90 % right), the heads with a score of 0.5 or more are the same set, "
                "and scores before and after correlate with 0.9 or more (Pearson, over heads)"
            ),
            control="overlap of the set with layer-matched random sets of its size",
        ),
        Claim(
            id="always-active",
            kind="claim",
            claim=(
                "(4) dynamically activated: take Llama-2 7B for example, 12 retrieval heads always attend to "
                "the required information no matter how the context is changed."
            ),
            paper_figure="12 heads of Llama-2-7B are active in every context (abstract)",
            criterion=(
                "in every shipped model that retrieves, at least one retrieval head (score 0.1 or more) scores above "
                "0 in every one of 64 or more correct runs that change filler, length and depth of the context"
            ),
            control="the share of runs in which other heads of the same layers score above 0",
        ),
        Claim(
            id="sometimes-active",
            kind="claim",
            claim="The rest of the retrieval heads are activated in different contexts.",
            criterion=(
                "in at least one shipped model there are two or more retrieval heads (0.1 or more) that are active in "
                "some runs and idle in others, and they differ in the runs in which they are active"
            ),
            control="the same prompts run again: the same heads are active (context decides, not chance)",
        ),
        Claim(
            id="causal",
            kind="claim",
            claim=(
                "(5) causal: completely pruning retrieval heads leads to failure in retrieving relevant "
                "information and results in hallucination,"
            ),
            paper_figure="masking the top 30 heads of Llama-2-7B ruins needle retrieval (official README)",
            criterion=(
                "with all heads of 0.1 or more removed (output zeroed), fewer than 20 % of held-out answer tokens are "
                "right in every shipped model that retrieves, and at least half of the wrong ones that it then says "
                "by itself are tokens that are not in the answer's telling"
            ),
            control="layer-matched live heads below 0.1 (200 draws, or all subsets)",
        ),
        Claim(
            id="random-heads",
            kind="claim",
            claim="while pruning random non-retrieval heads does not affect the model's retrieval ability.",
            paper_figure="masking 30 random heads of Llama-2-7B leaves retrieval intact (official README)",
            criterion=(
                "with as many live heads below 0.1 removed as there are retrieval heads, drawn from any layer (200 "
                "draws), the mean loss is below 5 points of accuracy in every shipped model that retrieves"
            ),
            control="the same with heads of the same layers; every draw is kept, the worst is shown beside the mean",
            known=(
                "in models of three and four layers a random set often takes the previous-token heads of the first "
                "layers, on which retrieval is built; heads of the same layers as the retrieval heads can be removed "
                "without loss (control). A model of a thousand heads has many to do each job"
            ),
        ),
        Claim(
            id="chain-of-thought",
            kind="claim",
            claim=(
                "We further show that retrieval heads strongly influence chain-of-thought (CoT) reasoning, "
                "where the model needs to frequently refer back the question and previously-generated context."
            ),
            paper_figure="MuSiQue, GSM8K and MMLU with chain of thought suffer from masking (recalled)",
            criterion=(
                "questions that the text model answers in two written steps, the second asking for the person whom "
                "its first named (the start of each sentence is given): it gets at least half of them right, removing "
                "the heads of 0.5 or more takes away at least half of these, and more than twice what layer-matched "
                "heads take away"
            ),
            control="layer-matched live heads below 0.1 (10 draws, or all subsets)",
        ),
        Claim(
            id="intrinsic-knowledge",
            kind="claim",
            claim=(
                "Conversely, tasks where the model directly generates the answer using its intrinsic knowledge "
                "are less impacted by masking out retrieval heads."
            ),
            paper_figure="answers without chain of thought lose less (recalled)",
            criterion=(
                "removing all heads with a score of 0.5 or more costs what is in the weights (the likeliest next word "
                "of bigram text, single-digit addition where it is learned to 80 %; words of the text model's answers "
                "that it guesses right without the needle) less relative accuracy than needles; the 95 % interval of "
                "every difference over prompts excludes 0"
            ),
            control="the same numbers for layer-matched live heads below 0.1",
        ),
        Claim(
            id="explain",
            kind="claim",
            claim=(
                "These observations collectively explain which internal part of the model seeks information "
                "from the input tokens."
            ),
            criterion=(
                "on held-out needles, for at least 90 % of the answer tokens that are right, some head of 0.5 "
                "or more (scores from other needles) has its strongest weight on the very token that is copied"
            ),
            control="the same share for as many layer-matched live heads below 0.1",
        ),
        Claim(
            id="planted",
            kind="check",
            claim="In the hand-built models the copying head scores 1 and every other head 0.",
            criterion="the copying head of each hand-built model scores at least 0.999, all others at most 0.01",
        ),
        Claim(
            id="teacher-forced",
            kind="check",
            claim="One teacher-forced forward gives the scores of greedy decoding whenever the model is right.",
            criterion="on prompts answered right, scores of the two ways differ by less than 1e-6 for every head",
        ),
        Claim(
            id="stable",
            kind="check",
            claim="Scores are a property of the head, not of the prompt's length.",
            criterion="scores at context length T and 2T correlate with 0.9 or more (Pearson, over heads)",
            control="correlation with the scores of a random-weight model",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Score the shipped models on needles, take heads away, and train one of them on longer contexts."""
    from headwise.papers import _retrieval_rows as rows
    from headwise.papers._retrieval_setup import RETRIEVES, Extension, Reader, Removals

    tasks, text = (Reader.load(name, run) for name in ("tasks", "text"))
    able = [reader for reader in (tasks, text) if reader.right_at_longest >= RETRIEVES] or [tasks, text]
    removals = {reader.name: Removals.of(reader, run) for reader in able}
    extended = Extension.of(tasks, run)
    rows.draw(run, able, removals, extended)
    return {
        "responsible": rows.responsible(removals),
        "universal": rows.universal(able),
        "sparse": rows.sparse(able),
        "intrinsic": rows.intrinsic(able),
        "extension": rows.extension(tasks, extended, run),
        "always-active": rows.always_active(able),
        "sometimes-active": rows.sometimes_active(able),
        "causal": rows.causal(removals),
        "random-heads": rows.random_heads(removals),
        "chain-of-thought": rows.chain_of_thought(text, run),
        "intrinsic-knowledge": rows.intrinsic_knowledge(able, run),
        "explain": rows.explain(able, run),
        "planted": rows.hand_built(run),
        "teacher-forced": rows.teacher_forced(able),
        "stable": rows.stable(able),
    }
