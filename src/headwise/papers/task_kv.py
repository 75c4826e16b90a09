"""Cache budgets per head by semantic distance: heads far from their layer's centre keep the whole prompt.

Method: headwise/memory/task_kv.py, headwise/memory/budget_policies.py. No official code was found; constants and
equations are those of a public note on the full paper, and what is reconstructed is said in the docstrings.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="task-kv",
    title="Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
    authors="He, Liu, Chen",
    year=2025,
    arxiv="2501.15113",
    area="memory",
    modules=(
        "headwise.memory.task_kv",
        "headwise.memory.budget_policies",
        "headwise.hf.head_budgets",
        "headwise.ops.observation",
        "headwise.papers._task_kv_setup",
        "headwise.papers._task_kv_rows",
    ),
    specimens=("tasks", "text"),
    claims=(
        Claim(
            id="memory",
            kind="claim",
            claim=(
                "KV cache is a widely used acceleration technique for large language models (LLMs) inference. However, "
                "its memory requirement grows rapidly with input length."
            ),
            criterion=(
                "in both shipped models transformers' DynamicCache takes twice the bytes at twice the length (128, 256 "
                "and 512 tokens, within 1 %), and at 32,768 tokens the cache of one text would take more bytes than "
                "the model's weights"
            ),
            control="bytes of Task-KV at 40 % on the same texts",
        ),
        Claim(
            id="literature",
            kind="untestable",
            claim=(
                "Previous studies have reduced the size of KV cache by either removing the same number of unimportant "
                "tokens for all attention heads or by allocating differentiated KV cache budgets for pre-identified "
                "attention heads."
            ),
            criterion=(
                "a statement about the literature; SnapKV and StreamingLLM (the first kind) and a cache fed by a map "
                "of retrieval heads (the second) are the rivals of the other rows"
            ),
        ),
        Claim(
            id="tasks-differ",
            kind="claim",
            claim=(
                "However, due to the importance of attention heads varies across different tasks, the pre-identified "
                "attention heads fail to adapt effectively to various downstream tasks."
            ),
            criterion=(
                "what is lost when a head of the tasks model is removed correlates less between two tasks than between "
                "two halves of the prompts of one task (six tasks; 95 % interval over pairs of tasks), and at 40 % of "
                "the bytes, question in the prompt, on the tasks that are no needles, Task-KV answers more than the "
                "cache fed by the map of retrieval heads (95 % paired interval over questions)"
            ),
            control="the same difference on needles, for which the heads of the map were identified",
            known=(
                "the importance of heads differs between tasks, as claimed, but the map of retrieval heads still "
                "answers 9 to 13 points more than Task-KV on the tasks that are no needles: a few copying heads "
                "serve all tasks of these models"
            ),
        ),
        Claim(
            id="heterogeneous",
            kind="claim",
            claim=(
                "We demonstrate that attention heads far from the semantic center (called heterogeneous heads) make an "
                "significant contribution to task outputs and semantic understanding."
            ),
            criterion=(
                "question in the prompt, all tasks of both models, 64 questions each: removing (output zeroed from the "
                "first token on, each text its own) the f key heads of every layer that stand farthest from its centre "
                "makes more answers wrong than removing as many other live key heads of the same layers (mean of 4 "
                "draws for each text); the 95 % paired interval over questions lies above 0"
            ),
            control="the other live heads of the same layers",
        ),
        Claim(
            id="others",
            kind="claim",
            claim=(
                "In contrast, other attention heads play the role of aggregating important information and focusing "
                "reasoning."
            ),
            criterion=(
                "question in the prompt, all tasks of both models: the last 16 queries of the other live heads put "
                "more of their attention on the tokens that hold the answer, and spread it less (entropy over the log "
                "of the number of keys), than those of the f heads farthest from the centre; both 95 % paired "
                "intervals over questions lie above 0"
            ),
            control="the same two differences for random splits of the same live heads",
            known=(
                "in these models the heads far from the centre are the ones that look at few tokens (their entropy "
                "is lower by 0.18): a head that mixes few values keeps a long semantic vector, one that mixes many "
                "averages it away"
            ),
        ),
        Claim(
            id="preserve",
            kind="claim",
            claim=(
                "Task-KV allocates full KV cache budget to heterogeneous heads to preserve comprehensive semantic "
                "information, while reserving a small number of recent tokens and attention sinks for "
                "non-heterogeneous heads."
            ),
            paper_figure="full-cache quality at 40 % of the memory on summarisation and synthetic tasks (note)",
            criterion=(
                "at 40 % of the bytes, measured over all layers, full heads hold every token and all others sinks and "
                "recent tokens; and, question in the prompt, all tasks of both models, answers are at most 3 points "
                "below those of the full cache (lower end of the 95 % paired interval)"
            ),
            control="a random split with the same numbers of heads",
            known=(
                "the answers depend on the far heads (row `heterogeneous`), but it is not they that read the answer "
                "from far back (row `others`); with one or two of 4 or 8 key heads whole, the budget goes to heads "
                "that can do without it, and a random split loses 8 points less"
            ),
        ),
        Claim(
            id="middle",
            kind="claim",
            claim=(
                "Furthermore, we innovatively introduce middle activations to preserve key contextual information "
                "aggregated from non-heterogeneous heads."
            ),
            paper_figure="the most activated middle tokens are better than none, and than their mean (ablation, note)",
            criterion=(
                "at 40 % of the bytes, question in the prompt, all tasks of both models, Task-KV answers more with its "
                "middle activations than with as many more recent tokens in their place; the 95 % paired interval over "
                "questions lies above 0"
            ),
            control="no middle activations (fewer bytes), and one token that is the mean of what is dropped",
        ),
        Claim(
            id="separator",
            kind="claim",
            claim=(
                "To dynamically perceive semantic differences among attention heads, we design a semantic separator to "
                "distinguish heterogeneous heads from non-heterogeneous ones based on their distances from the "
                "semantic center."
            ),
            criterion=(
                "in both models the full heads of two texts of different tasks overlap less (Jaccard, over layers) "
                "than those of two texts of one task (128 pairs each; 95 % interval), and at 40 % of the bytes, "
                "question in the prompt, all tasks of both models, Task-KV answers at least 5 points more than a "
                "random split (95 % paired interval above 0)"
            ),
            control="overlap of random splits; the cache without any split",
            known=(
                "full heads do follow the task (overlap 0.69 within and 0.36 between tasks), but the heads that are "
                "chosen are those of row `preserve`, and a random split answers 7 to 9 points more"
            ),
        ),
        Claim(
            id="outperforms",
            kind="claim",
            claim=(
                "Experimental results on multiple benchmarks and different model architectures demonstrate that "
                "Task-KV significantly outperforms existing baseline methods."
            ),
            paper_figure=(
                "LongBench and LooGLE averages, Llama-2-7B-Chat at 40 %: 7.94 against HeadKV-R2 7.80, PyramidKV 7.76, "
                "SnapKV 7.60, StreamingLLM 6.67; at 60 %: 8.13 against 7.94, 7.89, 8.05, 6.71; Mistral-7B at 40 %: "
                "10.73 against 10.63, 10.45, 10.31, 9.37 (note)"
            ),
            criterion=(
                "at 40 % and at 60 % of the bytes, question in the prompt, all tasks of both models, Task-KV answers "
                "more than each of StreamingLLM, SnapKV and the cache fed by a map of retrieval heads; the 95 % paired "
                "interval over questions of each difference lies above 0"
            ),
            control="no split, and a random split; 20 % of the bytes and questions in a second turn stand beside it",
            known=(
                "see row `preserve`; with the same budgets a cache that keeps the heads of the retrieval map whole "
                "answers 14 to 26 points more"
            ),
        ),
        Claim(
            id="whole",
            kind="check",
            claim="With a full budget the cache gives the bits of transformers' DynamicCache.",
            criterion=(
                "logits of a padded batch, of a second turn and of single tokens are equal bit for bit in both models"
            ),
        ),
        Claim(
            id="mask",
            kind="check",
            claim="With any budget the cache is the whole cache with what a head dropped hidden from it.",
            criterion=(
                "in float64, logits after a prompt compressed to 40 % differ by less than 1e-8 from those of a forward "
                "without a cache in which rows of weights are set to 0 where a head dropped the key"
            ),
            control="how far the logits of the whole cache are away",
        ),
        Claim(
            id="bytes",
            kind="check",
            claim="Every method keeps what its budget says, in bytes over all layers, sinks and recent ones included.",
            criterion="for every method, task and budget the measured share is the budget or at most 4 points below",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Ask the shipped models about texts of 300 tokens, under caches of equal bytes."""
    from headwise.papers import _task_kv_rows as rows
    from headwise.papers._task_kv_setup import Accuracies, Reader

    readers = [Reader.load(name, run) for name in ("tasks", "text")]
    found = Accuracies.of(readers, run)
    splits = rows.Splits.of(readers, run)
    rows.draw(run, found)
    return {
        "memory": rows.memory(readers),
        "tasks-differ": rows.tasks_differ(readers, found, run),
        "heterogeneous": rows.heterogeneous(readers, run),
        "others": rows.others(splits),
        "preserve": rows.preserve(readers, found),
        "middle": rows.middle(found),
        "separator": rows.separator(found, splits),
        "outperforms": rows.outperforms(found),
        "whole": rows.whole(readers),
        "mask": rows.mask(readers),
        "bytes": rows.measured_bytes(found),
    }
