"""One training by transformers' Trainer, as all recipes do it."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

__all__ = ["CONVERTED", "train_model"]

CONVERTED = "headwise_convert"  # in the config of a model of transformers: what its attention was converted to


def train_model(
    model: PreTrainedModel,
    train: Dataset,
    test: Dataset,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    out: str | Path | None,
    training: Mapping[str, Any] | None,
    metrics: Callable[..., dict[str, float]],
    predictions: Callable[..., Any] | None = None,
) -> dict[str, float]:
    """Train and test; the figures of the test by name ("eval_loss", ...). The model is left in evaluation mode.

    out: folder that the model is written to; None writes nothing. metrics: the Trainer's `compute_metrics`, called for
    every batch where training says `batch_eval_metrics`. predictions: what is kept of the logits.
    AdamW, one cosine after 5 % of warm-up; training: further `TrainingArguments`, which win.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {
            "output_dir": scratch if out is None else str(out),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 256,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 20),
            "seed": seed,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **(training or {}),
        }
        trainer = Trainer(
            model,
            TrainingArguments(**options),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=predictions,
        )
        trainer.remove_callback(PrinterCallback)  # stdout is the caller's
        trainer.train()
        figures = trainer.evaluate()
        if out is not None:
            trainer.save_model(str(out))
            if hasattr(model.config, CONVERTED) and trainer.is_world_process_zero():
                # A checkpoint's old names for its modules would stand before those that were added, too.
                model.save_pretrained(str(out), save_original_format=False)
    model.eval()
    return figures
