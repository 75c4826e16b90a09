"""Focus: find a place in a picture at once, or after a summary and an analysis, whichever the model's tag asks for.

    slow  iff  p(<slow> | I, q) > theta;      fast: p(c | I, q);      slow: p(s | I, q) p(a | I, q, s) p(c | I, q, s, a)

The prompt is read once, picture included: its cache serves the decision and both ways. A batch is decided together and
written in two parts. Cost per sample: the prompt, and as many steps as its own way needs.

Paper: headwise/papers/focus_gui_grounding.py (Tang et al., 2025).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from headwise.hf.addresses import unwrap
from headwise.hf.continued import ReadPrompt, read_prompt
from headwise.hf.images import image_positions, image_token
from headwise.hf.load import load
from headwise.tasks.gui import Point, read_point

__all__ = ["FastSlowDecoder", "Grounding", "GroundingStage"]

Mode = Literal["fast", "slow"]
Given = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class GroundingStage:
    """Text that the slow way writes before the point.

    end: text of one token that ends the stage. limit: most tokens of the stage; it is cut there, the end is written for
    the model, and the next stage begins. opening: text put in front, "Summary:" say.
    """

    name: str
    end: str = "\n"
    limit: int = 64
    opening: str = ""


@dataclass(frozen=True)
class Grounding:
    """One answer. point: (x, y) as shares of the picture's sides, None where none could be read. stage_texts: by stage.

    tokens_used: tokens after the prompt, tag and end included. tokens: their ids. cut: stages that met their limit.
    """

    point: Point | None
    mode: Mode
    stage_texts: dict[str, str]
    tokens_used: int
    p_slow: float
    text: str
    tokens: tuple[int, ...]
    cut: tuple[str, ...] = ()


class FastSlowDecoder:
    """Decode greedily after a mode tag, in stages where the tag is slow.

    model: one with pictures among its tokens (LLaVA, Qwen2-VL, ...), or the folder, hub id or specimen of one, whose
    tokenizer is then the default. fast_tag, slow_tag: each one token. stages: names, or `GroundingStage`s. threshold:
    theta; 0 is always slow, 1 always fast. point_tokens: most tokens of the coordinates. among: p is over the whole
    vocabulary, or over the two tags alone. coordinates: the model writes thousandths of the sides, or pixels of the
    picture as it was given to the model (resized, then).
    Raises ValueError for tags and stage ends that are not one known token, UnsupportedModel without pictures.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        tokenizer: Any = None,
        fast_tag: str = "<fast>",
        slow_tag: str = "<slow>",
        stages: Sequence[str | GroundingStage] = ("summary", "analysis"),
        threshold: float | int = 0.5,
        *,
        point_tokens: int = 16,
        among: str = "vocabulary",
        coordinates: str = "thousandths",
    ) -> None:
        if not isinstance(model, nn.Module):
            loaded = load(model)
            model, tokenizer = loaded.model, loaded.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("FastSlowDecoder: tokenizer is None; tags and coordinates are text, give the tokenizer")
        image_token(model)
        if not 0 <= threshold <= 1:
            raise ValueError(f"FastSlowDecoder: threshold is {threshold}; it is a probability, within 0 and 1")
        if among not in ("vocabulary", "tags"):
            raise ValueError(f"FastSlowDecoder: among is {among!r}; expected vocabulary or tags")
        if coordinates not in ("thousandths", "pixels"):
            raise ValueError(f"FastSlowDecoder: coordinates is {coordinates!r}; expected thousandths or pixels")
        if point_tokens < 1:
            raise ValueError(f"FastSlowDecoder: point_tokens is {point_tokens}; a point needs 1 or more")
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        self.among, self.coordinates, self.point_tokens = among, coordinates, point_tokens
        self.fast, self.slow = self._token("fast_tag", fast_tag), self._token("slow_tag", slow_tag)
        if self.fast == self.slow:
            raise ValueError(f"FastSlowDecoder: fast_tag and slow_tag are both {fast_tag!r}; they must differ")
        self.stages = tuple(x if isinstance(x, GroundingStage) else GroundingStage(x) for x in stages)
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"FastSlowDecoder: stages are {names}; give one or more, each name once")
        for stage in self.stages:
            if stage.limit < 1:
                raise ValueError(f"FastSlowDecoder: limit of stage {stage.name!r} is {stage.limit}; give 1 or more")
        self._ends = [self._token(f"end of stage {stage.name!r}", stage.end) for stage in self.stages]
        self._stop = _stop_tokens(model, tokenizer)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _token(self, where: str, text: str) -> int:
        ids = self._ids(text)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if len(ids) != 1 or ids[0] == unknown:
            what = "unknown to the tokenizer" if unknown in ids else f"{len(ids)} tokens"
            raise ValueError(
                f"FastSlowDecoder: {where} {text!r} is {what}; it must be one token: add it with "
                "tokenizer.add_special_tokens, call model.resize_token_embeddings, and train it"
            )
        return ids[0]

    def read(self, **inputs: Any) -> ReadPrompt:
        """Read the prompts, once for whatever follows.

        Raises ValueError for prompts without a picture, or padded on the right.
        """
        seen = image_positions(self.model, inputs)
        if not bool(seen.any(1).all()):
            raise ValueError(
                f"FastSlowDecoder: {int((~seen.any(1)).sum())} of {len(seen)} prompts have no picture; give one each"
            )
        return read_prompt(self.model, inputs)

    def p_slow(self, prompt: ReadPrompt) -> Float[Tensor, " b"]:
        """The probability of the slow tag after each prompt."""
        logits = prompt.logits.float()
        if self.among == "tags":
            return (logits[:, self.slow] - logits[:, self.fast]).sigmoid()
        return logits.softmax(-1)[:, self.slow]

    def generate(self, *, given: Given | None = None, **inputs: Any) -> list[Grounding]:
        """Answer each prompt, in its own way. given: texts of stages, which are then not written by the model.

        inputs: as the model's forward takes them, `[b, s]` token ids and pictures.
        """
        prompt = self.read(**inputs)
        p = self.p_slow(prompt)
        slow = (p > self.threshold) | (self.threshold <= 0)  # a p that underflows to 0 is slow at 0, too
        sizes = self._sizes(inputs)
        answers: dict[int, Grounding] = {}
        choices: tuple[tuple[Mode, Tensor], ...] = (("fast", ~slow), ("slow", slow))
        for mode, chosen in choices:
            rows = chosen.nonzero()[:, 0].tolist()
            if rows:
                part = prompt if len(rows) == len(prompt) else prompt.select(rows)
                texts = None if given is None else {k: _some(k, v, rows, len(prompt)) for k, v in given.items()}
                found = self._write(part, mode, p[rows].tolist(), [sizes[r] for r in rows], texts)
                answers |= dict(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(prompt))]

    def both(self, *, given: Given | None = None, **inputs: Any) -> tuple[list[Grounding], list[Grounding]]:
        """Each prompt answered in the fast way and in the slow way, the prompt being read once."""
        prompt = self.read(**inputs)
        p, sizes = self.p_slow(prompt).tolist(), self._sizes(inputs)
        rows = list(range(len(prompt)))
        texts = None if given is None else {k: _some(k, v, rows, len(prompt)) for k, v in given.items()}
        return self._write(prompt, "fast", p, sizes, None), self._write(prompt, "slow", p, sizes, texts)

    def _sizes(self, inputs: Mapping[str, Any]) -> list[tuple[float, float] | None]:
        """Width and height of each prompt's picture in the pixels that the model saw; None where not needed."""
        count = len(inputs["input_ids"])
        if self.coordinates == "thousandths":
            return [None] * count
        grid = inputs.get("image_grid_thw")
        if grid is not None:
            patch = unwrap(self.model).config.vision_config.patch_size
            sizes: list[tuple[float, float] | None] = [
                (float(w * patch), float(h * patch)) for _, h, w in grid.tolist()
            ]
        else:
            height, width = inputs["pixel_values"].shape[-2:]
            sizes = [(float(width), float(height))] * len(inputs["pixel_values"])
        if len(sizes) != count:
            raise ValueError(
                f"FastSlowDecoder: {len(sizes)} pictures for {count} prompts; pixel coordinates need one picture each"
            )
        return sizes

    def _write(
        self,
        prompt: ReadPrompt,
        mode: Mode,
        p_slow: Sequence[float],
        sizes: Sequence[tuple[float, float] | None],
        given: Mapping[str, Sequence[str]] | None,
    ) -> list[Grounding]:
        """Continue every row in one mode; a row that is done leaves the batch."""
        for name in given or {}:
            if name not in [stage.name for stage in self.stages]:
                raise ValueError(f"FastSlowDecoder: given has {name!r}, which is none of the stages")
        rows = [self._row(mode, {k: v[i] for k, v in (given or {}).items()}) for i in range(len(prompt))]
        active, prompt = rows, prompt.extend(prompt.mask.new_tensor([[row.tokens[0]] for row in rows]))
        while active:
            best = prompt.logits.argmax(-1).tolist()
            for row, token in zip(active, best, strict=True):
                row.step(token)
            left = [place for place, row in enumerate(active) if not row.done]
            if not left:
                break
            if len(left) < len(active):
                prompt, active = prompt.select(left), [active[place] for place in left]
            prompt = prompt.extend(prompt.mask.new_tensor([[row.tokens[-1]] for row in active]))
        return [self._answer(row, mode, p, size) for row, p, size in zip(rows, p_slow, sizes, strict=True)]

    def _row(self, mode: Mode, given: Mapping[str, str]) -> "_Row":
        point = _Part(None, self.point_tokens)
        if mode == "fast":
            return _Row([self.fast], [point], self._stop)
        parts = []
        for stage, end in zip(self.stages, self._ends, strict=True):
            opening = self._ids(stage.opening) if stage.opening else []
            text = [*self._ids(given[stage.name]), end] if stage.name in given else []
            parts.append(_Part(end, stage.limit, (*opening, *text), len(opening)))
        return _Row([self.slow], [*parts, point], self._stop)

    def _answer(self, row: "_Row", mode: Mode, p_slow: float, size: tuple[float, float] | None) -> Grounding:
        texts = [self.tokenizer.decode(part, skip_special_tokens=True).strip() for part in row.texts]
        names = [stage.name for stage in self.stages] if mode == "slow" else []
        return Grounding(
            point=read_point(texts[-1], size),
            mode=mode,
            stage_texts=dict(zip(names, texts, strict=False)),
            tokens_used=len(row.tokens),
            p_slow=p_slow,
            text=self.tokenizer.decode(row.tokens),
            tokens=tuple(row.tokens),
            cut=tuple(names[part] for part in row.cut),
        )


@dataclass(frozen=True)
class _Part:
    """A stage, or the point. end: None ends at the model's stop tokens. forced: written for the model, first.

    opening: how many of the forced tokens are no text of the stage.
    """

    end: int | None
    limit: int
    forced: tuple[int, ...] = ()
    opening: int = 0


@dataclass
class _Row:
    """One answer as it is written. tokens: so far, tag included. texts: ids by part. cut: parts at their limit."""

    tokens: list[int]
    parts: Sequence[_Part]
    stop: frozenset[int]
    texts: list[list[int]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        if len(self.texts) == len(self.parts):
            self.done = True
            return
        part = self.parts[len(self.texts)]
        self.texts.append([])
        self.queue, self.skip = list(part.forced), part.opening

    def step(self, best: int) -> None:
        """Take the next token: what is forced, else the most likely one."""
        part = self.parts[len(self.texts) - 1]
        token = self.queue.pop(0) if self.queue else best
        if part.end is not None and token in self.stop:
            token = part.end  # a stage that the model ends with everything ends alone
        self.tokens.append(token)
        if self.skip:
            self.skip -= 1
        elif token == part.end or (part.end is None and token in self.stop):
            self._begin()
        else:
            self.texts[-1].append(token)
            if len(self.texts[-1]) >= part.limit and not self.queue:
                if part.end is None:
                    self._begin()
                else:
                    self.cut.append(len(self.texts) - 1)
                    self.queue = [part.end]


def _stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text, by the model's generation settings, else by its tokenizer."""
    settings = getattr(unwrap(model), "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return frozenset([] if found is None else found if isinstance(found, list) else [found])


def _some(name: str, texts: str | Sequence[str], rows: Sequence[int], count: int) -> list[str]:
    """The given texts of some rows; one text serves all."""
    if isinstance(texts, str):
        return [texts] * len(rows)
    if len(texts) != count:
        raise ValueError(
            f"FastSlowDecoder: given has {len(texts)} texts of {name!r} for {count} prompts; give one each"
        )
    return [texts[row] for row in rows]
