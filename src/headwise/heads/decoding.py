"""Prompts and answers: what reading a model while it answers needs, whatever is read.

Prompts of different lengths run together, padded on the left. Answers are decoded greedily, token by token, so that
each step can be read or edited; or they are put in the model's mouth, and one forward tells what it would have said.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headwise.attend.read import Probe
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import tower_kinds, unwrap
from headwise.hf.inputs import cache_of, context_length, takes, vocabulary_size, with_cache
from headwise.hf.session import probe
from headwise.tasks.needles import Needle

__all__ = ["forced_answers", "greedy_answers"]

Span = tuple[int, int]
Prompt = Needle | Int[Tensor, " _"] | Sequence[int]  # an axis without a name: prompts differ in length


@dataclass(frozen=True)
class Case:
    """One prompt. answer: the tokens of its first span."""

    number: int
    ids: Int[Tensor, " t"]
    spans: tuple[Span, ...]

    @property
    def answer(self) -> Int[Tensor, " n"]:
        start, end = self.spans[0]
        return self.ids[start:end]


def greedy_answers(
    model: nn.Module,
    prompts: Sequence[Prompt] | Int[Tensor, "b t"],
    *,
    max_new_tokens: int = 50,
    stop: int | Iterable[int] | None = None,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """What the model says after each prompt, decoded greedily as `retrieval_scores` does; a stop token is included.

    The last token of a prompt is the first decoding step, so that under `Ablate(..., when="generated")` heads are
    masked exactly where the paper masks them: the prompt before it is read with all heads.
    """
    where = "greedy_answers"
    cases = checked_cases(where, model, prompts, None, need_spans=False)
    ends = stop_ids(where, model, stop)
    found: list[list[int]] = [[] for _ in cases]
    for batch in batched(cases, batch_tokens, max_new_tokens):
        answers, _ = decode(model, [case.ids for case in batch], max_new_tokens, ends)
        for case, answer in zip(batch, answers, strict=True):
            found[case.number] = answer
    return found


def forced_answers(
    model: nn.Module,
    prompts: Sequence[Prompt] | Int[Tensor, "b t"],
    targets: Sequence[Int[Tensor, " _"] | Sequence[int]],
    *,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """What the model would say at every token of the targets, the prompt and the target's tokens before it given.

    One forward for a batch of prompts; with edits open it measures how often answers stay right without decoding them.
    """
    where = "forced_answers"
    cases = checked_cases(where, model, prompts, None, need_spans=False)
    told = checked_targets(where, targets, len(cases), vocabulary_size(model))
    found: list[list[int]] = [[] for _ in cases]
    for batch in batched(cases, batch_tokens, max(map(len, told))):
        wanted = [told[case.number] for case in batch]
        answers, _ = force(model, [case.ids for case in batch], wanted)
        for case, answer in zip(batch, answers, strict=True):
            found[case.number] = answer
    return found


def force(
    model: nn.Module, prompts: list[Tensor], targets: list[Tensor], reader: Probe | None = None
) -> tuple[list[list[int]], list[int]]:
    """As `decode`, with the targets fed instead of the answers: the rows of a target are the last ones of its text."""
    fed = [torch.cat([prompt, target[:-1]]) for prompt, target in zip(prompts, targets, strict=True)]
    check_room(model, fed)
    ids, real = left_padded(fed, embedding_device(model))
    given = arguments(model, ids, real)
    last = max(map(len, targets))
    if takes(unwrap(model), "logits_to_keep"):
        given["logits_to_keep"] = last
    with torch.no_grad(), nullcontext() if reader is None else probe(model, reader):
        said = model(**given).logits[:, -last:].argmax(-1).cpu()
    answers = [said[row, -len(target) :].tolist() for row, target in enumerate(targets)]
    return answers, [ids.shape[1] - len(text) for text in fed]


def decode(
    model: nn.Module, prompts: list[Tensor], limit: int, stop: set[int], reader: Probe | None = None
) -> tuple[list[list[int]], list[int]]:
    """Greedy answers, each up to its stop token, and how much padding each prompt got.

    reader: a probe that sees the decoding steps, the one of the prompt's last token first, and not the prompt before.
    """
    check_room(model, prompts)
    ids, real = left_padded(prompts, embedding_device(model))
    room = context_length(model)
    limit = limit if room is None else min(limit, room - ids.shape[1] + 1)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    with torch.no_grad():
        cache = None
        if ids.shape[1] > 1:
            given = arguments(model, ids[:, :-1], real[:, :-1])
            if takes(unwrap(model), "logits_to_keep"):
                given["logits_to_keep"] = 1
            cache = _cache(model, model(**given, use_cache=True))
        with nullcontext() if reader is None else probe(model, reader):
            last = ids[:, -1:]
            for _ in range(limit):
                out = model(**arguments(model, last, real), **with_cache(model, cache))
                cache = _cache(model, out)
                last = out.logits[:, -1:].argmax(-1)
                tokens = last[:, 0].tolist()
                for row in list(running):
                    answers[row].append(tokens[row])
                    if tokens[row] in stop:
                        running.discard(row)
                if not running:
                    break
                real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
    return answers, [ids.shape[1] - len(prompt) for prompt in prompts]


def arguments(model: nn.Module, ids: Int[Tensor, "b t"], real: Bool[Tensor, "b s"]) -> dict[str, Any]:
    """Ids, mask and positions of one forward; positions count from the first real token, as padding is no text."""
    given: dict[str, Any] = {"input_ids": ids}
    if not bool(real.all()):
        given["attention_mask"] = real.long()
        if takes(unwrap(model), "position_ids"):
            given["position_ids"] = (real.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return given


def _cache(model: nn.Module, out: Any) -> Any:
    cache = cache_of(out)
    if cache is None:
        raise UnsupportedModel(
            f"decode: {type(unwrap(model)).__name__} returns no cache, so it cannot answer token by token; score heads "
            "with copy_scores, which needs one forward"
        )
    return cache


def left_padded(prompts: list[Tensor], device: torch.device) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        real[row, longest - len(prompt) :] = True
    return ids.to(device), real.to(device)


def embedding_device(model: nn.Module) -> torch.device:
    """Where the model takes its tokens: the embedding's device, which matters where layers lie on several."""
    return unwrap(model).get_input_embeddings().weight.device  # pyright: ignore[reportReturnType]


def batched(cases: list[Case], batch_tokens: int, extra: int) -> list[list[Case]]:
    """Prompts of like length together, the longest first, so that little is padded and memory runs out at once."""
    batches: list[list[Case]] = []
    for case in sorted(cases, key=lambda case: (-len(case.ids), case.number)):
        if batches and (len(batches[-1]) + 1) * (len(batches[-1][0].ids) + extra) <= batch_tokens:
            batches[-1].append(case)
        else:
            batches.append([case])
    return batches


def checked_cases(where: str, model: nn.Module, prompts: Any, spans: Any, *, need_spans: bool) -> list[Case]:
    """Check everything a caller gave, once."""
    _check_model(where, model)
    given = list(prompts)
    if not given:
        raise ValueError(f"{where}: there are no prompts; give at least one")
    if spans is None and need_spans:
        if not all(isinstance(prompt, Needle) for prompt in given):
            raise ValueError(f"{where}: spans is missing; say where the answer stands in each prompt, or give needles")
        spans = [prompt.spans for prompt in given]
    spans = [()] * len(given) if spans is None else list(spans)
    if len(spans) != len(given):
        raise ValueError(f"{where}: {len(given)} prompts but {len(spans)} spans; give one for each prompt")
    size = vocabulary_size(model)
    cases = []
    for number, (prompt, told) in enumerate(zip(given, spans, strict=True)):
        if isinstance(prompt, Needle):
            if prompt.input_ids is None:
                raise ValueError(f"{where}: prompt {number} has no tokens; make the needles with tokenizer=")
            prompt = prompt.input_ids
        ids = checked_ids(f"{where}: prompt {number}", prompt, size)
        cases.append(Case(number, ids, _spans(f"{where}: prompt {number}", told, len(ids), need_spans)))
    return cases


def checked_ids(where: str, given: Any, size: int) -> Int[Tensor, " t"]:
    if isinstance(given, str):
        raise TypeError(f"{where} is a text; give its token ids, as in tokenizer(text).input_ids")
    ids = torch.as_tensor(given).detach().cpu()
    if ids.ndim != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{where} has shape {tuple(ids.shape)} of {ids.dtype}; expected one row of token ids")
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(f"{where} has ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to {size - 1}")
    return ids.long()


def _spans(where: str, told: Any, length: int, needed: bool) -> tuple[Span, ...]:
    several = tuple(told)
    if needed and not several:
        raise ValueError(f"{where} has no span: the answer was not found in it; give (start, end)")
    if several and not isinstance(several[0], Sequence | Tensor):
        several = (several,)
    found = []
    for span in several:
        start, end = (int(edge) for edge in span)
        if not 0 <= start < end <= length:
            raise ValueError(
                f"{where}: its span is ({start}, {end}); expected 0 <= start < end <= {length}, the tokens of the "
                "prompt that hold the answer"
            )
        found.append((start, end))
    return tuple(found)


def _check_model(where: str, model: nn.Module) -> None:
    inner, kinds = unwrap(model), tower_kinds(model)
    if inner.config.is_encoder_decoder or kinds.get("") != "causal" or not inner.can_generate():
        raise UnsupportedModel(
            f"{where}: {type(inner).__name__} does not continue a text by itself; retrieval heads are defined for "
            "decoders with a language-model head, such as those of AutoModelForCausalLM"
        )
    if model.training:
        raise ValueError(f"{where}: the model is in training mode; call model.eval() first")


def check_room(model: nn.Module, prompts: list[Tensor]) -> None:
    room, longest = context_length(model), max(map(len, prompts))
    if room is not None and longest > room:
        raise ValueError(f"prompts: the longest has {longest} tokens but the model reads {room}; give shorter ones")


def stop_ids(where: str, model: nn.Module, stop: int | Iterable[int] | None) -> set[int]:
    if stop is None:
        config = getattr(unwrap(model), "generation_config", None) or unwrap(model).config
        stop = getattr(config, "eos_token_id", None)
    if isinstance(stop, str):
        raise TypeError(f"{where}: stop is {stop!r}; give token ids")
    ids = set() if stop is None else {stop} if isinstance(stop, int) else {int(token) for token in stop}
    if any(token < 0 for token in ids):
        raise ValueError(f"{where}: stop is {sorted(ids)}; give token ids of 0 or more, or [] to never stop")
    return ids


def checked_targets(where: str, targets: Any, count: int, size: int) -> list[Int[Tensor, " _"]]:
    given = list(targets)
    if len(given) != count:
        raise ValueError(f"{where}: {count} prompts but {len(given)} targets; give one for each prompt")
    return [checked_ids(f"{where}: target {number}", target, size) for number, target in enumerate(given)]
