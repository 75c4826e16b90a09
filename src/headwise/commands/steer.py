"""`headwise steer`: what a model writes with and without edits."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands import inventory
from headwise.commands.common import (
    Device,
    Dtype,
    Json,
    Output,
    Seed,
    device_of,
    document,
    dtype_of,
    output,
    quiet_libraries,
)
from headwise.errors import InputError

__all__ = ["steer"]


def steer(
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or a specimen's name (see --list).")] = "text",
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit", help="NAME[:key=value,...] or module:Class[:...]; give it repeatedly, applied in order."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The text to continue.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="A picture, for a vision-language model; it stands before the text.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option("--heads", help="Which heads: 3.1, 0-2.*, top:sink:4, random:4 (see --list); all.")
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="A heads.json, for selections by score such as top:sink:4.")
    ] = None,
    when: Annotated[str | None, typer.Option("--when", help="Which rows: all, prompt or generated.")] = None,
    group: Annotated[
        str | None, typer.Option("--group", help="Key group for edits that need one: first, spans:3-9 (see --list).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How many tokens to write.")] = 40,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="key=value,value,...: run with each, and show losses beside texts.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="A continuation whose loss is shown; left out: the plain text.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List probes, edits, key groups and specimens.")] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Let MODEL continue a prompt with and without edits, and show both."""
    with output(as_json) as said:
        if listing:
            return inventory.show(said)
        if not edit:
            raise InputError("steer: no --edit was given, as in --edit zero-tuning:gamma=1.6; --list shows all of them")
        if prompt is None:
            raise InputError('steer: no --prompt was given, as in --prompt "The captain said"')
        given = {"heads": heads, "when": when, "group": group}
        run(said, model, edit, prompt, image, given, map_file, max_new_tokens, sweep, reference, seed, device, dtype)


def run(
    said: Output,
    name: str,
    texts: list[str],
    prompt_text: str,
    image: Path | None,
    given: dict[str, str | None],
    map_file: Path | None,
    new: int,
    sweep: str | None,
    reference: str | None,
    seed: int,
    device: str | None,
    dtype: str | None,
) -> None:
    key, values = _checked(texts, given, sweep)
    head_map = read_map(map_file)
    from headwise import _generate as writing
    from headwise.api import load, steer

    quiet_libraries()
    said.progress(0, 1, f"loading {name}")
    loaded = load(name, device=device_of(device), dtype=dtype_of(dtype))
    steering = Steering(said, loaded, head_map, seed)
    prompt = writing.read_prompt(loaded, prompt_text, new, image)
    if prompt.new < new:
        said.note(f"note: the context leaves room for {prompt.new} new tokens, not {new}")
    versions = [(value, steering.edits(texts, given, key, value)) for value in values]
    said.progress(0, 1 + len(versions), "writing")
    plain = writing.generate(loaded, prompt)
    target = plain if reference is None else writing.reference_ids(loaded, prompt_text, prompt, reference)
    plain_loss = writing.losses(loaded, prompt, target)
    rows = []
    for done, (value, edits) in enumerate(versions, 1):
        said.progress(done, 1 + len(versions), "writing")
        with steer(loaded.model, *edits):
            written = writing.generate(loaded, prompt)
            loss = writing.losses(loaded, prompt, target)
        rows.append({"value": value, "ids": written, "loss": loss})
    said.clear()
    result = document(
        model=loaded.name,
        edits=[_shown(text, given) for text in texts],
        heads=[str(head) for head in steering.heads(versions[0][1])],
        prompt=prompt_text,
        plain=writing.text_of(loaded, plain),
        steered=None if key else writing.text_of(loaded, rows[0]["ids"]),
        tokens={
            "prompt": writing.words(loaded, prompt.ids[0].tolist()),
            "plain": writing.words(loaded, plain),
            "steered": None if key else writing.words(loaded, rows[0]["ids"]),
        },
        changed_at=None if key else writing.first_difference(plain, rows[0]["ids"]),
        reference=writing.text_of(loaded, target),
        loss={"plain": _loss(plain_loss), **({} if key else {"steered": _loss(rows[0]["loss"])})},
        notes=steering.notes,
    )
    if key:
        result["sweep"] = {
            "parameter": key,
            "rows": [
                {
                    "value": _plain(row["value"]),
                    "prompt_loss": row["loss"][0],
                    "reference_loss": row["loss"][1],
                    "text": writing.text_of(loaded, row["ids"]),
                    "changed_at": writing.first_difference(plain, row["ids"]),
                }
                for row in rows
            ],
        }
    if said.as_json:
        return said.write(result)
    _print(result, reference is not None)


def _checked(texts: list[str], given: dict[str, str | None], sweep: str | None) -> tuple[str | None, list[str | None]]:
    """The swept parameter and its values, (None, [None]) without one; names are checked before a model is loaded."""
    from headwise._edits import parameters, split_edit
    from headwise.attend.addresses import nearest

    classes = [split_edit(text)[:2] for text in texts]
    if given["when"] not in (None, "all", "prompt", "generated"):
        raise InputError(f"when: {given['when']!r} is unknown; choose all, prompt or generated")
    if given["group"] is not None and not any("group" in parameters(cls) for _, cls in classes):
        raise InputError(f"group: {classes[0][0]} takes no key group; leave --group out")
    if sweep is None:
        return None, [None]
    key, equals, rest = sweep.partition("=")
    key, values = key.strip().replace("-", "_"), [value.strip() for value in rest.split(",") if value.strip()]
    if not equals or not values:
        raise InputError(f"sweep: {sweep!r} cannot be read; write key=value,value,... as in gamma=0.3,1,3")
    known = dict.fromkeys(name for _, cls in classes for name in parameters(cls))
    if key not in known:
        raise InputError(
            f"sweep: no edit here has a parameter {key!r}; they have {', '.join(known)}{nearest(key, known)}"
        )
    return key, list(values)


def read_map(path: Path | None) -> Any:
    if path is None:
        return None
    if not path.is_file():
        raise InputError(f"map: {path} is not there; `headwise scan --out DIR` writes a heads.json")
    from headwise.attend.head_map import HeadMap

    return HeadMap.read(path)


class Steering:
    """Makes the edits of one run for one model: their heads resolved, scores found where selections need them."""

    def __init__(self, said: Output, loaded: Any, head_map: Any, seed: int) -> None:
        from headwise.hf.addresses import layout

        self.said, self.loaded, self.head_map, self.seed = said, loaded, head_map, seed
        self.layout = layout(loaded.model)
        self.notes: list[str] = []
        self._scanned: dict[str, Any] = {}
        self._statistics: Any = None

    def scores(self, probe: str) -> Any:
        """Scores by probe: of --map, else of the specimen's own map, else of a scan that is run now."""
        probe = probe.replace("_", "-")
        if self.head_map is not None:
            return self.head_map.of(probe)
        from headwise._scan import resolve_probes
        from headwise.api import HeadMap, scan

        shipped = getattr(self.loaded, "head_map", None)
        if shipped is not None:
            found = HeadMap.load(shipped)
            if probe in found.probes:
                return found.of(probe)
        if probe not in self._scanned:
            resolve_probes(probe)
            self.tell(f"no --map was given, so the probe {probe} was run first, as headwise scan runs it")
            model, tokenizer = self.loaded.model, self.loaded.tokenizer
            self._scanned[probe] = scan(model, tokenizer, probes=probe, seed=self.seed, progress=self.said.progress)
        return self._scanned[probe].of(probe)

    def tell(self, text: str) -> None:
        self.notes.append(text)
        self.said.note(f"note: {text}")

    def edits(self, texts: list[str], given: dict[str, str | None], key: str | None, value: str | None) -> list[Any]:
        """The edits of the command line, with one value of a sweep, their heads resolved."""
        from headwise._edits import make_edit, make_group, parameters, split_edit
        from headwise.attend.addresses import select_heads

        tokenizer = self.loaded.tokenizer
        defaults: dict[str, Any] = {"heads": given["heads"], "when": given["when"] or "all"}
        if given["group"] is not None:
            defaults["group"] = make_group(given["group"], tokenizer)
        made = []
        for text in texts:
            name, cls, options = split_edit(text)
            if key is not None and key in parameters(cls):
                options[key] = str(value)
            extra = {}
            if options.get("mode") in ("mean", "resample") and "statistics" in parameters(cls):
                extra["statistics"] = self.statistics()
            one = make_edit(_joined(name, options), defaults | extra, tokenizer)
            one.heads = select_heads(one.heads, self.layout, scores=self.scores, seed=self.seed)
            made.append(one)
        return made

    def statistics(self) -> Any:
        """Outputs of heads on the shipped page, for ablation by mean and by resampling."""
        if self._statistics is None:
            import torch

            from headwise._texts import default_text, windows
            from headwise.api import head_outputs
            from headwise.hf.inputs import context_length

            size = min(1024, context_length(self.loaded.model, self.loaded.tokenizer) or 1024)
            first = windows(default_text(), self.loaded.tokenizer, size, causal=True)[0]
            self.tell("the outputs that replace a head's are those on the shipped page")
            self._statistics = head_outputs(self.loaded.model, torch.tensor([first.ids]))
        return self._statistics

    def heads(self, edits: list[Any]) -> list[Any]:
        """Every head that the edits name, in order, each once."""
        parts = [part for edit in edits for part in edit.primitives()]  # a method may keep to some layers
        return list(dict.fromkeys(head for part in parts for head in part.named(self.layout)))


def _joined(name: str, options: dict[str, str]) -> str:
    return name + (":" + ",".join(f"{key}={value}" for key, value in options.items()) if options else "")


def _shown(text: str, given: dict[str, str | None]) -> dict[str, Any]:
    """An edit as a document: its name, the options that were written, and the shared ones."""
    from headwise._edits import parameters, split_edit

    name, cls, options = split_edit(text)
    shared = {key: value for key, value in given.items() if value is not None and key in parameters(cls)}
    return {"edit": name, "options": shared | options}


def _plain(value: str) -> float | int | str:
    """A value of a sweep as JSON has it."""
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number if math.isfinite(number) else value


def _loss(pair: tuple[float | None, float | None]) -> dict[str, float | None]:
    return {"prompt": pair[0], "reference": pair[1]}


def _print(result: dict[str, Any], referenced: bool) -> None:
    for one in result["edits"]:
        options = "  ".join(f"{key}={value}" for key, value in one["options"].items())
        print(f"edit     {one['edit']}  {options}".rstrip())
    heads = result["heads"]
    print(f"heads    {', '.join(heads[:12])}{f' and {len(heads) - 12} more' if len(heads) > 12 else ''}")
    print(f"prompt   {_line(result['prompt'])}")
    print(f"plain    {_line(result['plain'])}")
    if "sweep" not in result:
        print(f"steered  {_line(result['steered'])}")
        at = result["changed_at"]
        print("the same text" if at is None else f"differs from new token {at} on")
        if referenced:
            for name, loss in result["loss"].items():
                numbers = f"{_number(loss['prompt'])}, of the reference {_number(loss['reference'])}"
                print(f"{name:8} loss of the prompt {numbers}")
        return
    what = "the reference" if referenced else "the plain text"
    print(f"\nloss a token of the prompt and of {what}:")
    print(f"{result['sweep']['parameter']:>10}  prompt  {'ref.':>6}  text")
    plain = result["loss"]["plain"]
    print(f"{'plain':>10}  {_number(plain['prompt'])}  {_number(plain['reference'])}  {_line(result['plain'])}")
    for row in result["sweep"]["rows"]:
        numbers = f"{_number(row['prompt_loss'])}  {_number(row['reference_loss'])}"
        same = " (the same)" if row["changed_at"] is None else ""
        print(f"{row['value']!s:>10}  {numbers}  {_line(row['text'])}{same}")


def _number(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:6.3f}"


def _line(text: str) -> str:
    """A text on one line, without what would steer a terminal."""
    shown = text.strip().replace("\n", "↵ ")
    return "".join(c if c.isprintable() else "·" for c in shown)
