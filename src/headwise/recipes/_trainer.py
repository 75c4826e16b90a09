"""What the recipes ask of transformers' Trainer: so many steps, one cosine, nothing on stdout."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel

from headwise.errors import InputError

CONVERTED = "headwise_convert"  # in the config of a model of transformers: what its attention was converted to
Progress = Callable[[int, int, str], None]


def train_with(
    model: nn.Module,
    data: Dataset,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    out: str | Path | None = None,
    warmup: float = 0.05,
    training: Mapping[str, Any] | None = None,
    sampler: Callable[[int], Sampler[int]] | None = None,
    progress: Progress | None = None,
    **trainer: Any,
) -> Any:
    """Train a model in place and return its Trainer. out: folder that the model is written to; None writes nothing.

    warmup: share of the steps. training: further `TrainingArguments`. sampler: what draws the numbers of examples, from
    the size of a batch; None shuffles. progress: called with steps done, steps, and a word. trainer: further arguments
    of `Trainer`. AdamW, one cosine after the warm-up. Raises InputError where accelerate is not installed.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils.import_utils import is_accelerate_available

    if not is_accelerate_available():
        raise InputError('train: accelerate is not installed; pip install "headwise[train]"')

    class Drawn(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if sampler is None:
                return super()._get_train_sampler(train_dataset)
            return sampler(self._train_batch_size)

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                progress(state.global_step, steps, "training")

    # Losses here are means over a batch; the Trainer would take **options of a forward for a promise to sum them.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {
            "output_dir": scratch if out is None else str(out),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 256,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, round(steps * warmup)),
            "seed": seed,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **(training or {}),
        }
        made = Drawn(model, TrainingArguments(**options), train_dataset=data, callbacks=[Told()], **trainer)
        made.remove_callback(PrinterCallback)  # stdout is the caller's
        made.train()
        if out is not None:
            made.save_model(str(out))
            (Path(out) / "training_args.bin").unlink(missing_ok=True)  # a pickle
            if isinstance(model, PreTrainedModel) and hasattr(model.config, CONVERTED) and made.is_world_process_zero():
                # A checkpoint's old names for its modules would stand before those that were added, too.
                model.save_pretrained(str(out), save_original_format=False)
    return made
