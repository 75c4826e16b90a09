"""A scan: probes over every head of a model, on a text, and what a report of it needs."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise._folders import writable_folder
from headwise._inputs import Inputs, Pass
from headwise._texts import Text, read_text
from headwise.attend.addresses import Head, Layout, nearest
from headwise.attend.head_map import HeadMap
from headwise.attend.probes import PROBES
from headwise.attend.read import SAMPLE, SAMPLED_ABOVE, Probe
from headwise.errors import InputError, UnsupportedModel
from headwise.heads.prompt_probe import PromptProbe, prompt_probes
from headwise.hf.addresses import layout, tower_kinds
from headwise.hf.load import Loaded, load, register, register_family
from headwise.hf.maps import maps_during
from headwise.hf.session import probe as reading
from headwise.models.own import PREFIX, own_class
from headwise.report.html import compare as comparison
from headwise.report.html import sparse_rows
from headwise.specimens.registry import load_specimen, specimen_names

__all__ = ["Scan", "compare", "resolve_probes", "scan"]

EXAMPLE_TOKENS, EXAMPLES_PER_PROBE = 400, 3
# Heads that copy show what they do on a prompt that says something twice.
COPYING = ("duplicate", "induction", "induction-repeat", "previous", "retrieval")
PLAIN = "The captain said"
REPEATING = "Teresa Novak lives in Geneva, above the shop. Teresa Novak lives in"
Progress = Callable[[int, int, str], None]
Rows = Literal["auto", "all"]
AnyProbe = Probe | PromptProbe

register(specimen_names, load_specimen)
register_family(PREFIX, own_class)


class Scan(HeadMap):
    """A head map, with what the heads looked at.

    notes: how it was measured. probes_used: name -> (sentence, unit). texts, examples: as `headwise.report` takes them.
    """

    def __init__(
        self,
        scores: Mapping[str, Mapping[Head, float | None]],
        layout: Layout,
        *,
        model: str = "",
        source: str = "",
        runs: Mapping[str, Sequence[Mapping[Head, float]]] | None = None,
        notes: Sequence[str] = (),
        about: Mapping[str, tuple[str, str]] | None = None,
        texts: Sequence[Mapping[str, Any]] = (),
        examples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(scores, layout, model=model, source=source, runs=runs)
        self.notes, self.about = list(notes), dict(about or {})
        self.texts: list[Mapping[str, Any]] = list(texts)
        self.examples: list[Mapping[str, Any]] = list(examples)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"notes": self.notes}

    def write(self, out: str | os.PathLike[str], *, comparison: Mapping[str, Any] | None = None) -> dict[str, Path]:
        """Write heads.json, heads.csv, heads.png and report.html into a folder; returns their paths by name.

        comparison: what `compare` returned; the report then shows the differences. The picture needs matplotlib
        (``pip install "headwise[plots]"``) and is left out without it.
        """
        from headwise.report.html import write_report
        from headwise.report.plots import plot_head_map
        from headwise.report.suggestions import suggest

        folder = writable_folder(out)
        files = {name: folder / name for name in ("heads.json", "heads.csv", "heads.png", "report.html")}
        self.save(files["heads.json"])
        self.to_csv(files["heads.csv"])
        if find_spec("matplotlib") is None:
            del files["heads.png"]
        else:
            plot_head_map(self, files["heads.png"], tower=_tower_of(self))
        document = self.to_json()
        for name, table in document.pop("probes").items():
            sentence, unit = self.about.get(name, ("", ""))
            top = self.top(name, 10, tower="*")
            document.setdefault("probes", {})[name] = {
                "sentence": sentence,
                "unit": unit,
                "scores": table,
                "top": [str(head) for head in top],
                "try": suggest(
                    name,
                    model=self.model,
                    map_path=str(files["heads.json"]),
                    tower=top[0].tower if top else "",
                    prompt=REPEATING if name in COPYING else PLAIN,
                ),
            }
        document |= {"texts": self.texts, "examples": self.examples, "comparison": comparison}
        document["versions"] = {"torch": torch.__version__}
        write_report(document, files["report.html"])
        return files


def _tower_of(scores: HeadMap) -> str:
    """The first tower in which a head has a score."""
    read = {head.tower for table in scores.scores.values() for head, score in table.items() if score is not None}
    return next(tower.name for tower in scores.layout.towers if tower.name in read)


def resolve_probes(probes: str | Iterable[str | AnyProbe | type[AnyProbe]] | None) -> list[AnyProbe]:
    """Probes by name, class or object, each once. None: those that a scan runs unasked; "all": every one.

    Raises InputError for an unknown name, with the nearest one.
    """
    prompted = prompt_probes()
    known: dict[str, type[AnyProbe]] = {**PROBES, **prompted}
    if probes is None:
        return [cls() for cls in known.values() if not issubclass(cls, PromptProbe) or cls.by_default]
    found: dict[str, AnyProbe] = {}
    for item in [probes] if isinstance(probes, str) else probes:
        if isinstance(item, str):
            for name in item.replace("_", "-").split(","):
                chosen = list(known) if name == "all" else [name.strip()]
                for one in chosen:
                    if one not in known:
                        raise InputError(
                            f"probe: {one!r} is unknown; there are {', '.join(known)}{nearest(one, known)}"
                        )
                    found.setdefault(one, known[one]())
            continue
        made = item() if isinstance(item, type) else item
        if not isinstance(made, Probe | PromptProbe):
            raise InputError(f"probe: {made!r} is no probe; subclass headwise.attend.Probe")
        found[made.name or type(made).__name__] = made
    if not found:
        raise InputError("probe: none was named; leave the list out for all quick probes")
    return list(found.values())


def scan(
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: Any = None,
    *,
    probes: str | Iterable[str | AnyProbe | type[AnyProbe]] | None = None,
    text: Path | str | Sequence[str] | Tensor | Text | None = None,
    images: str | os.PathLike[str] | None = None,
    rows: Rows = "auto",
    window: int = 1024,
    batch_tokens: int = 4096,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Score every head of a model under every probe.

    model: a hub id, a local folder, a specimen's name, or a loaded model with its tokenizer; None is the text specimen.
    probes: names, classes or objects; None runs all that read the text and the quick ones that bring prompts, "all" the
        slow ones too.
    text: a Path to a text or JSONL file, a text, several texts, or token ids `[b, t]`; None is the shipped page. Cut
        into windows of `window` tokens (fewer where the model reads fewer), `batch_tokens` at a time.
    images: a folder of pictures for vision towers. rows: "all" forms every row of attention also in windows above
        2,048 tokens, "auto" a fixed sample of 512 of them.
    seed: of generated prompts. progress: called with tokens read, tokens in all, and what is being done.

    >>> scan(model, tokenizer, probes=["sink", "previous"]).top("sink", 3)  # doctest: +SKIP
    [Head(layer=3, head=1), Head(layer=2, head=0), Head(layer=3, head=6)]
    """
    chosen = resolve_probes(probes)
    if rows not in ("auto", "all"):
        raise InputError(f"rows: {rows!r} is unknown; choose auto or all")
    if window < 8 or batch_tokens < 8:
        raise InputError(f"window, batch_tokens: {window}, {batch_tokens}; expected at least 8 tokens each")
    given = text if isinstance(text, Tensor | Text | None) else read_text(text)
    loaded = _loaded(model, tokenizer, device, dtype)
    inputs = Inputs(loaded, given, None if images is None else Path(images), window, batch_tokens)
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        return _scan(loaded, chosen, inputs, rows, seed, progress or _silent)
    finally:
        loaded.model.train(was_training)


def _silent(done: int, total: int, what: str) -> None:
    pass


def _loaded(model: Any, tokenizer: Any, device: Any, dtype: Any) -> Loaded:
    if isinstance(model, nn.Module):
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        return Loaded(model=model, tokenizer=tokenizer, name=str(name))
    loaded = load("text" if model is None else os.fspath(model), device=device, dtype=dtype)
    if tokenizer is not None:
        loaded.tokenizer = tokenizer
    return loaded


def _scan(
    loaded: Loaded,
    chosen: list[AnyProbe],
    inputs: Inputs,
    rows: Rows,
    seed: int,
    progress: Progress,
) -> Scan:
    model = loaded.model
    table, kinds = layout(model), tower_kinds(model)
    texts = [one for one in chosen if isinstance(one, Probe)]
    notes: list[str] = []
    scores: dict[str, Mapping[Head, float | None]] = {}
    runs: dict[str, list[dict[Head, float]]] = {}
    source = ""
    if texts:
        work = inputs.passes()
        source = work.source
        notes += work.notes
        for one in texts:
            one.sampled = rows == "auto"
        if rows == "auto" and work.longest > SAMPLED_ABOVE:
            notes.append(f"Windows above {SAMPLED_ABOVE:,} tokens are read at a fixed sample of {SAMPLE} rows.")
        scores |= _read(model, texts, work.passes, progress)
        notes += _skipped(texts, scores, table, kinds)
    for number, one in enumerate(one for one in chosen if isinstance(one, PromptProbe)):
        progress(number, len(chosen) - len(texts), one.name)
        try:
            measured = one.measure(model, loaded.tokenizer, seed=seed)
        except UnsupportedModel as error:
            if len(chosen) == 1:
                raise
            notes.append(f"Left out {error}.")
            continue
        scores[one.name] = measured.of(one.name)
        if measured.runs.get(one.name):
            runs[one.name] = measured.runs[one.name]
        source = source or measured.source
        notes.append(f"{one.name}: {measured.source or 'prompts of its own'}.")
    scores = {name: values for name, values in scores.items() if any(_known(v) for v in values.values())}
    if not scores:
        names = ", ".join(_name(one) for one in chosen)
        raise InputError(f"probe: no head of {loaded.name} has a score under {names}; {' '.join(notes)}")
    about = {_name(one): (one.sentence, str(getattr(one, "unit", ""))) for one in chosen}
    result = Scan(scores, table, model=loaded.name, source=source, runs=runs, notes=notes, about=about)
    shown, examples = _examples(result, inputs)
    result.texts, result.examples = list(shown), list(examples)
    return result


def _name(probe: AnyProbe) -> str:
    return probe.name or type(probe).__name__


def _known(score: float | None) -> bool:
    return score is not None and not math.isnan(score)


def _read(
    model: nn.Module, probes: list[Probe], passes: Sequence[Pass], progress: Progress
) -> dict[str, dict[Head, float]]:
    total, done = sum(one.tokens for one in passes), 0
    progress(0, total, "reading")
    with torch.no_grad(), reading(model, *probes):
        for one in passes:
            one.run()
            done += one.tokens
            progress(done, total, "reading")
    return {
        _name(one): {
            Head(layer, head, tower): value
            for (tower, layer), values in one.scores().items()
            for head, value in enumerate(values.tolist())
        }
        for one in probes
    }


def _skipped(
    probes: Sequence[Probe], scores: Mapping[str, Mapping[Head, Any]], table: Layout, kinds: Mapping[str, str]
) -> list[str]:
    """What was not read, in words: towers that these inputs do not reach, probes that make no sense in a tower."""
    notes = []
    for tower in table.towers:
        read = any(head.tower == tower.name for name in scores for head in scores[name])
        undefined = [_name(one) for one in probes if one.causal_only and kinds.get(tower.name) != "causal"]
        if not read and len(undefined) < len(probes):
            need = "pictures (--images DIR)" if tower.name == "vision" else "other inputs"
            notes.append(f"The {tower.name} tower was not read: it needs {need}.")
        elif undefined:
            where = f" in the {tower.name} tower" if tower.name else ""
            notes.append(f"Not defined for {kinds[tower.name]} attention, left out{where}: {', '.join(undefined)}.")
    return notes


def _examples(result: Scan, inputs: Inputs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The strongest heads of every probe with their attention over the first tokens of the text."""
    example = inputs.example(EXAMPLE_TOKENS)
    if example is None:
        return [], []
    wanted: dict[Head, str] = {}
    ranked = {name: {t: result.top(name, EXAMPLES_PER_PROBE, tower=t) for t in example.texts} for name in result.probes}
    for place in range(EXAMPLES_PER_PROBE):  # first of every probe, then the second: a page that is full keeps the best
        for name, towers in ranked.items():
            for heads in towers.values():
                for head in heads[place : place + 1]:
                    wanted.setdefault(head, name)
    try:
        maps = maps_during(inputs.model, example.run, list(wanted))
    except ValueError as error:  # a layer that is used at several depths has several maps a head
        result.notes.append(f"Attention over the text is not shown: {error}.")
        return [], []
    order = list(example.texts)
    texts = [example.texts[tower] for tower in order]
    examples = [
        {
            "probe": name,
            "head": str(head),
            "text": order.index(head.tower),
            "rows": sparse_rows(maps[head][0]),
            "focus": _focus(maps[head][0], texts[order.index(head.tower)]["tokens"]),
        }
        for head, name in wanted.items()
    ]
    return texts, examples


def _focus(weights: Float[Tensor, "t s"], tokens: Sequence[str]) -> int:
    """The row to show first: a word from which the head looks hard at something, not at itself or at the start.

    A head that looks nowhere else is shown at a late word.
    """
    t = weights.shape[0]
    elsewhere = weights.detach().clone()
    elsewhere[:, 0] = 0
    elsewhere.diagonal().zero_()
    # What follows an earlier copy of the word, or is one, tells more than any other place.
    same = torch.tensor([[a == b for b in tokens] for a in tokens], device=weights.device).tril(-1)
    copies = (elsewhere * (same | same.roll(1, 1)).tril(-1)).sum(-1)
    strength = elsewhere.amax(-1) + copies
    words = torch.tensor([len(token.strip()) > 2 for token in tokens], device=weights.device)
    strength[~words] = -1
    strength[: t // 8] -= 1  # the first rows have little to look at
    if strength.amax() < 0.2:
        late = words.nonzero().flatten()
        return int(late[len(late) * 3 // 4]) if len(late) else t - 1
    return int(strength.argmax())


def compare(scan: HeadMap, other: HeadMap | str | os.PathLike[str], *, k: int | None = None) -> dict[str, Any]:
    """How two maps of heads differ: ``{"name", "probes": {name: {"scores", "correlation", "overlap", "k"}}}``.

    scores: this map minus the other, head by head. correlation: of ranks. overlap: share of the k strongest heads that
    both have; None is a quarter of the heads, at most 10. other: a map, or the path of one.
    Raises InputError when the models have different heads, or the maps no probe in common.
    """
    theirs = other if isinstance(other, HeadMap) else HeadMap.read(other, scan.layout)
    if [(t.name, t.heads) for t in scan.layout.towers] != [(t.name, t.heads) for t in theirs.layout.towers]:
        raise InputError(
            f"compare: {scan.model or 'this model'} has {_shape(scan.layout)} but {theirs.model or 'the other'} has "
            f"{_shape(theirs.layout)}; only models with the same heads can be compared head by head"
        )
    quarter = len(scan.layout.heads()) // 4
    found = comparison(scan, theirs, k=k if k is not None else max(1, min(10, quarter)))
    if len(scan.layout.heads("*")) < 2:
        raise InputError("compare: these models have one head, and ranks need two; look at the scores themselves")
    if theirs.model == scan.model and theirs.source:  # the same model on another text
        found["name"] = f"{theirs.model} on {theirs.source}"
    if not found["probes"]:
        raise InputError(
            f"compare: no probe in common; here {', '.join(scan.probes)}, there {', '.join(theirs.probes)}"
        )
    return found


def _shape(table: Layout) -> str:
    return "; ".join(
        f"{t.name + ': ' if t.name else ''}{_count(t.layers, 'layer')} of up to {_count(max(t.heads), 'head')}"
        for t in table.towers
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
