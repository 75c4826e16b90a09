"""Align pictures with a language model in two stages, as LLaVA-1.5 and SAISA do: projectors first, then all but vision.

Stage one trains the projectors on captions, with the language model and the vision tower frozen; stage two trains
projectors and language model on instructions. Both run through transformers' Trainer, so that `accelerate launch`,
FSDP, mixed precision and logging are its own. The model is a LLaVA, or what `headwise.convert` made of one.

Paper: headwise/papers/saisa.py (Yuan et al., 2025), which follows LLaVA-1.5: 558k captions at 1e-3, then a mixture of
665k conversations at 2e-5.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from headwise.errors import InputError
from headwise.tasks.captions import shapes_captions

__all__ = ["Conversations", "TrainedVisionLanguage", "load_conversations", "train_vision_language"]

STAGES = ("projectors", "all")
HELD_OUT = 10  # one conversation of so many is kept for testing
SPEAKERS = {"human": False, "user": False, "gpt": True, "assistant": True}
IMAGE_MARK = "<image>"


class Conversations(Dataset):
    """Conversations about pictures as a model reads them: the ids, what of them is answered, the pictures.

    items: (turns, pictures) each; turns: (text, whether the model says it), `<image>` in a text where a picture stands.
    picture: from an entry of pictures to pixels `[c h w]`. image_tokens: that stand for one picture.
    """

    def __init__(
        self,
        items: Sequence[tuple[Sequence[tuple[str, bool]], Sequence[Any]]],
        tokenizer: Any,
        picture: Callable[[Any], Tensor],
        *,
        image_token: int,
        image_tokens: int,
    ) -> None:
        self.items, self.tokenizer, self.picture = items, tokenizer, picture
        self.image_token, self.image_tokens = image_token, image_tokens

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        turns, pictures = self.items[index]
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = [] if start is None else [start]
        labels = [-100] * len(ids)
        for text, answer in turns:
            said = self._ids(text)
            if answer and end is not None:
                said.append(end)
            ids += said
            labels += said if answer else [-100] * len(said)
        found = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if pictures:
            found["pixel_values"] = torch.stack([self.picture(one) for one in pictures])
        return found

    def _ids(self, text: str) -> list[int]:
        parts = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(IMAGE_MARK)]
        ids = list(parts[0])
        for part in parts[1:]:
            ids += [self.image_token] * self.image_tokens + list(part)
        return ids

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, filled up on the right; its pictures one after the other, as the image tokens follow each other."""
        width = max(len(row["input_ids"]) for row in rows)
        pad = self.tokenizer.pad_token_id
        fill = {"input_ids": 0 if pad is None else pad, "labels": -100}
        made = {
            name: torch.stack(
                [torch.nn.functional.pad(row[name], (0, width - len(row[name])), value=value) for row in rows]
            )
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        made["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        if pictures := [row["pixel_values"] for row in rows if "pixel_values" in row]:
            made["pixel_values"] = torch.cat(pictures)
        return made

    def split(self) -> tuple["Conversations", "Conversations"]:
        """Those to train on and those to test with. Raises InputError for fewer than two."""
        if len(self) < 2:
            raise InputError(f"data: {len(self)} conversations; give two or more, one of them is kept for testing")
        every = max(2, min(HELD_OUT, len(self)))
        train = [item for number, item in enumerate(self.items) if number % every]
        return self._with(train), self._with(self.items[::every])

    def _with(self, items: Sequence[Any]) -> "Conversations":
        same = {"image_token": self.image_token, "image_tokens": self.image_tokens}
        return Conversations(items, self.tokenizer, self.picture, **same)


@dataclass(frozen=True)
class TrainedVisionLanguage:
    """The trained model; its loss on held-out conversations at the start and after each stage; what was trained."""

    model: Any
    losses: dict[str, float]
    parameters: dict[str, int]


def load_conversations(
    source: str | Path,
    model: Any,
    processor: Any,
    *,
    pictures: str | Path | None = None,
    count: int = 2000,
    seed: int = 0,
) -> Conversations:
    """Conversations for a model and its processor.

    source: a JSON file of LLaVA's form, a list of `{"image": NAME, "conversations": [{"from": "human" or "gpt",
    "value": TEXT}]}` with `<image>` in the text where the picture stands ("image" may be a list, or missing); or
    "shapes", `count` generated pictures with captions in the words of the `vision-language` specimen. pictures: the
    folder of the pictures; None is that of the file.

    Raises InputError for a file that is not there or not of that form.
    """
    tokenizer, config = processor.tokenizer, model.config
    size = _image_tokens(config)
    shared: dict[str, Any] = {"image_token": config.image_token_id, "image_tokens": size}
    if str(source) == "shapes":
        drawn = shapes_captions(count, seed=seed)
        pixels = drawn.pixel_values
        items = [
            ([(f"{IMAGE_MARK} describe :", False), (caption, True)], [number])
            for number, caption in enumerate(drawn.captions())
        ]
        return Conversations(items, tokenizer, pixels.__getitem__, **shared)
    path = Path(source)
    folder = path.parent if pictures is None else Path(pictures)

    def picture(name: str) -> Tensor:
        from PIL import Image

        try:
            with Image.open(folder / name) as opened:
                return processor.image_processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except OSError as error:
            raise InputError(f"data: {folder / name} cannot be read as a picture ({error})") from error

    return Conversations(_read(path), tokenizer, picture, **shared)


def _image_tokens(config: Any) -> int:
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return patches if config.vision_feature_select_strategy == "default" else patches + _class_tokens(config)


def _class_tokens(config: Any) -> int:
    return 0 if "siglip" in config.vision_config.model_type else 1


def _read(path: Path) -> list[tuple[list[tuple[str, bool]], list[str]]]:
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"data: {path} cannot be read as JSON ({error}); expected shapes, or a file as LLaVA's"
        ) from error
    items = []
    every: Any = rows if isinstance(rows, list) else [None]
    for number, row in enumerate(every):
        turns: Any = row.get("conversations") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and turn.get("from") in SPEAKERS and isinstance(turn.get("value"), str)
            for turn in turns
        ):
            raise InputError(
                f'data: entry {number} of {path} has no "conversations" of turns {{"from": "human" or "gpt", "value": '
                "TEXT}"
            )
        image = row.get("image", [])
        names = [image] if isinstance(image, str) else list(image)
        said = [(turn["value"], SPEAKERS[turn["from"]]) for turn in turns]
        marks = sum(text.count(IMAGE_MARK) for text, _ in said)
        if marks != len(names):
            raise InputError(f"data: entry {number} of {path} has {len(names)} pictures and {marks} times {IMAGE_MARK}")
        if not any(answer for _, answer in said):
            raise InputError(f"data: entry {number} of {path} has no turn of gpt, so that nothing is to be learned")
        items.append((said, names))
    return items


def trained_parts(model: Any, stage: str) -> list[Any]:
    """The modules that a stage trains. Raises ValueError for another stage."""
    if stage not in STAGES:
        raise ValueError(f"train_vision_language: stage is {stage!r}; choose {' or '.join(STAGES)}")
    projectors = [model.model.multi_modal_projector]
    return projectors if stage == "projectors" else [*projectors, model.model.language_model, model.lm_head]


def train_vision_language(
    model: Any,
    data: Conversations | Mapping[str, Conversations],
    *,
    steps: Mapping[str, int],
    learning_rates: Mapping[str, float] = {"projectors": 1e-3, "all": 2e-5},
    batch: int = 32,
    weight_decay: float = 0.0,
    out: str | Path | None = None,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
) -> TrainedVisionLanguage:
    """Train a LLaVA, NAAViT or SAISA in place, stage by stage, and test it before and after each.

    data: for both stages, or stage -> its own; one conversation of ten is held out. steps: stage -> how many, in the
    order in which they run, such as {"projectors": 2180, "all": 5200}. out: folder that the model is written to.
    training: further `TrainingArguments`, such as `bf16=True`. AdamW, one cosine after 3 % of warm-up, as LLaVA's.
    The vision tower stays as it is. Raises ValueError for a stage that is none, or for none.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    if not steps:
        raise ValueError(f"train_vision_language: steps is empty; name stages, {' and '.join(STAGES)}")
    parts = {stage: trained_parts(model, stage) for stage in steps}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    set_seed(seed)
    losses, parameters = {}, {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for stage, count in steps.items():
                own = data[stage] if isinstance(data, Mapping) else data
                train, test = own.split()
                model.requires_grad_(False)
                for part in parts[stage]:
                    part.requires_grad_(True)
                parameters[stage] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                options: dict[str, Any] = {
                    "output_dir": scratch,
                    "max_steps": count,
                    "per_device_train_batch_size": batch,
                    "per_device_eval_batch_size": batch,
                    "learning_rate": learning_rates[stage],
                    "weight_decay": weight_decay,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": max(1, math.ceil(0.03 * count)),
                    "seed": seed,
                    "report_to": [],
                    "save_strategy": "no",
                    "logging_strategy": "no",
                    "disable_tqdm": True,
                    "remove_unused_columns": False,
                    "prediction_loss_only": True,
                    "dataloader_pin_memory": torch.cuda.is_available(),
                    **(training or {}),
                }
                trainer = Trainer(
                    model,
                    TrainingArguments(**options),
                    train_dataset=train,
                    eval_dataset=test,
                    data_collator=own.collate,
                )
                trainer.remove_callback(PrinterCallback)  # stdout is the caller's
                losses.setdefault("start", trainer.evaluate()["eval_loss"])
                trainer.train()
                losses[stage] = trainer.evaluate()["eval_loss"]
                if out is not None and stage == list(steps)[-1]:
                    trainer.save_model(str(out))
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    return TrainedVisionLanguage(model.eval(), losses, parameters)
