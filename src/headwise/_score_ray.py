"""The scoring stage on Ray Data: the same windows, each scored whole by one actor, handed back in order.

An adapter only: windows are cut by one reading task and written by the caller, so the rows are those of one process.
"""

import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from headwise._score import Stage, windows
from headwise.errors import InputError
from headwise.tasks.documents import Corpus, Place

__all__ = ["scored_on_ray"]

CORES = 0.5  # of an actor: with a whole one each, actors can take every core, and the reading task waits for ever


class _Scorer:
    """A worker: the stage with its own copy of the model, on as many threads as the job began with."""

    def __init__(self, stage: Any, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        self.stage: Stage = ray.get(stage)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found = [pickle.loads(window) for window in batch["window"]]
        return {
            "number": [window.number for window in found],
            "scored": [pickle.dumps((window.after, self.stage(window))) for window in found],
        }


def scored_on_ray(
    stage: Stage, corpus: Corpus, start: Place, number: int, size: int, workers: int | None, threads: int
) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """The place behind each window and its rows, in order. workers: actors, None is one fewer than cores, at least 1.

    Raises InputError where ray is not installed, and for more workers than leave a core to read with.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError('engine: ray is not installed; pip install "headwise[ray]", or leave --engine out') from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="warning")
    cores = int(ray.cluster_resources().get("CPU", 1))
    count = max(1, cores - 1) if workers is None else workers
    if not 1 <= count <= max(1, round(cores / CORES) - 1):
        raise InputError(
            f"workers: {count}; this cluster of {cores} cores takes 1 to {max(1, round(cores / CORES) - 1)}"
        )
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    gpus = {"num_gpus": 1} if next(stage.model.parameters()).is_cuda else {}
    # Edits live in the process that made them; what travels is the model and which heads to mask.
    shared = ray.put(stage)
    source = ray.data.read_datasource(_datasource()(corpus, start, number, size), override_num_blocks=1)
    scored = source.map_batches(
        _Scorer,
        fn_constructor_args=(shared, threads),
        batch_size=1,
        num_cpus=CORES,
        concurrency=count,
        **gpus,
    )
    expected = number
    for row in scored.iter_rows():
        if row["number"] != expected:
            raise RuntimeError(f"ray handed back the window at {row['number']}, expected that at {expected}")
        after, rows = pickle.loads(row["scored"])
        expected += len(rows)
        yield after, rows


def _blocks(corpus: Corpus, start: Place, number: int, size: int) -> Iterator[Any]:
    """What the reading task does: a window a block. By name, so that it travels without what stands around it."""
    import pyarrow

    for window in windows(corpus, start, number, size):
        yield pyarrow.table({"window": pyarrow.array([pickle.dumps(window)], pyarrow.large_binary())})


def _datasource() -> type:
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Windows(Datasource):
        """Windows of a corpus, one a block, read by one task as they are wanted."""

        def __init__(self, corpus: Corpus, start: Place, number: int, size: int) -> None:
            self.given = corpus, start, number, size

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            corpus, start, number, size = self.given

            read = partial(_blocks, corpus, start, number, size)
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]

    return Windows
