"""Generating with and without edits, and the loss of a text under them: what `headwise steer` shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise._texts import readable
from headwise.errors import InputError
from headwise.hf.inputs import cache_of, context_length, input_device, takes, with_cache
from headwise.hf.load import Loaded

__all__ = ["Prompt", "first_difference", "generate", "losses", "read_prompt", "reference_ids", "text_of", "words"]


@dataclass
class Prompt:
    """A prompt as the model reads it. new: how many tokens may follow it. templated: in the chat template. pictures:
    what the processor makes of pictures beside the ids."""

    ids: Tensor
    new: int
    templated: bool
    pictures: dict[str, Tensor] = field(default_factory=dict)


def read_prompt(loaded: Loaded, text: str, new: int, image: Path | None = None) -> Prompt:
    """Tokenize a prompt, in the tokenizer's chat template where it has one.

    image: a picture in front of the text, or where the text has the model's image token.
    Raises InputError for a picture that cannot be read or given to the model, a model that does not generate text, an
    empty prompt and one beyond the model's context.
    """
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    if not (hasattr(model, "generate") and model.can_generate()) or not takes(model, "input_ids"):
        raise InputError(f"model: {loaded.name} ({type(model).__name__}) does not write text; scan it, or use Python")
    if tokenizer is None:
        raise InputError(f"model: {loaded.name} has no tokenizer beside it; save one into its folder")
    if not text.strip():
        raise InputError("prompt: it is empty; give a text to continue")
    templated = bool(getattr(tokenizer, "chat_template", None))
    pictures: dict[str, Tensor] = {}
    if image is not None:
        templated = bool(getattr(loaded.processor, "chat_template", None))
        made = _with_picture(loaded, text, image, templated)
        ids = {"input_ids": made.pop("input_ids")}
        made.pop("attention_mask", None)
        pictures = {name: value.to(input_device(model)) for name, value in made.items() if isinstance(value, Tensor)}
    elif templated:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(text, return_tensors="pt", verbose=False)
    ids = ids["input_ids"]
    limit = context_length(model, tokenizer)
    # An encoder-decoder writes into a sequence of its own.
    room = None if limit is None or model.config.is_encoder_decoder else limit - ids.shape[1]
    if limit is not None and (ids.shape[1] > limit or (room is not None and room < 1)):
        raise InputError(f"prompt: it has {ids.shape[1]:,} tokens but {loaded.name} reads {limit:,}; shorten it")
    if not ids.shape[1]:
        raise InputError("prompt: the tokenizer makes no token of it; give another text")
    return Prompt(ids.to(input_device(model)), new if room is None else min(new, room), templated, pictures)


def _with_picture(loaded: Loaded, text: str, image: Path, templated: bool) -> dict[str, Any]:
    """What the processor makes of a picture and a text."""
    processor = loaded.processor
    token = getattr(processor, "image_token", None)
    if processor is None or not hasattr(processor, "tokenizer") or not isinstance(token, str):
        raise InputError(
            f"image: {loaded.name} has no processor that takes a picture with text; leave --image out, or give a "
            "vision-language model"
        )
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"image: {image} cannot be read as a picture ({error})") from None
    if templated and token not in text:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    elif token not in text:
        text = f"{token} {text}"
    return dict(processor(images=[picture], text=[text], return_tensors="pt"))


def generate(loaded: Loaded, prompt: Prompt) -> list[int]:
    """Continue a prompt greedily; the new tokens, without those that end a text."""
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    with torch.no_grad():
        written = model.generate(
            input_ids=prompt.ids,
            attention_mask=torch.ones_like(prompt.ids),
            **prompt.pictures,
            max_new_tokens=prompt.new,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
    start = 1 if model.config.is_encoder_decoder else prompt.ids.shape[1]
    new = written[0, start:].tolist()
    ends = {tokenizer.eos_token_id, pad} - {None}
    while new and new[-1] in ends:
        new.pop()
    return new


def reference_ids(loaded: Loaded, prompt_text: str, prompt: Prompt, text: str) -> list[int]:
    """Tokens of a continuation. A space is put before it where neither text has one, as a writer would."""
    joined = prompt_text[-1:].isspace() or text[:1].isspace() or prompt.templated
    ids = loaded.tokenizer(text if joined else f" {text}", add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InputError("reference: it is empty; give the text whose loss is wanted")
    model: Any = loaded.model
    limit = context_length(model, loaded.tokenizer)
    if limit is not None and not model.config.is_encoder_decoder and prompt.ids.shape[1] + len(ids) > limit:
        raise InputError(
            f"reference: prompt and reference have {prompt.ids.shape[1] + len(ids):,} tokens but "
            f"{loaded.name} reads {limit:,}; shorten one"
        )
    return list(ids)


def losses(loaded: Loaded, prompt: Prompt, reference: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean loss of the prompt and of a continuation, in nats a token; None where there is nothing to predict.

    The continuation is read token by token on a filled cache, as it would be written, so that edits of generated tokens
    act on it.
    """
    model: Any = loaded.model
    if model.config.is_encoder_decoder:
        labels = torch.tensor([list(reference)], device=prompt.ids.device)
        with torch.no_grad():
            return None, float(model(input_ids=prompt.ids, labels=labels).loss) if len(reference) else None
    with torch.no_grad():
        out = model(input_ids=prompt.ids, use_cache=True, **prompt.pictures)
        logs = out.logits[0].float().log_softmax(-1)
        own = -logs[:-1].gather(-1, prompt.ids[0, 1:, None]) if prompt.ids.shape[1] > 1 else None
        cache, last, found = cache_of(out), logs[-1], []
        for number, token in enumerate(reference):
            found.append(-float(last[token]))
            if number + 1 < len(reference):
                step = torch.tensor([[token]], device=prompt.ids.device)
                out = model(input_ids=step, **with_cache(model, cache))
                cache, last = cache_of(out), out.logits[0, -1].float().log_softmax(-1)
    return None if own is None else float(own.mean()), sum(found) / len(found) if found else None


def first_difference(plain: Sequence[int], steered: Sequence[int]) -> int | None:
    """The first new token that differs; None where none does."""
    for index, (one, other) in enumerate(zip(plain, steered, strict=False)):
        if one != other:
            return index
    return None if len(plain) == len(steered) else min(len(plain), len(steered))


def words(loaded: Loaded, ids: Sequence[int]) -> list[str]:
    """Tokens as a person reads them."""
    return readable(loaded.tokenizer, ids)


def text_of(loaded: Loaded, ids: Sequence[int]) -> str:
    """Tokens as a text; special ones are shown only where there is nothing else."""
    text = loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
    return str(text or loaded.tokenizer.decode(list(ids)))
