"""The specimens by name: which there are, loading one, training one again.

A specimen is one module of this package with `NAME`, `SUMMARY` and `train(out, *, seed, log)`; adding one edits no
existing file. Hand-built ones have `build()`, `names()` and `card()` as well; the weights of the others lie in
`weights/<name>/`, an ordinary transformers folder with a `card.json` and, where one was scanned, a `heads.json`.
"""

import ast
import difflib
import functools
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.errors import InputError

__all__ = [
    "Specimen",
    "load_specimen",
    "specimen_checkpoints",
    "specimen_names",
    "specimen_summaries",
    "train_specimen",
]

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"


@dataclass(frozen=True)
class Specimen:
    """A loaded specimen. head_map: the path of its recorded head map, None where none was recorded.

    folder: where the weights lie, None for a specimen that is built by code. step: the training step of a checkpoint,
    None for the finished model. processor: takes pictures and text, None for a model that reads text alone and where
    pillow is not installed.
    """

    name: str
    model: Any
    tokenizer: Any
    card: dict[str, Any] = field(default_factory=dict)
    head_map: Path | None = None
    folder: Path | None = None
    step: int | None = None
    processor: Any = None


@functools.cache
def _modules() -> dict[str, tuple[str, str]]:
    """Name -> (module, summary), read by parsing: listing the specimens imports neither torch nor transformers."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        values = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and isinstance(node.value, ast.Constant)
            ):
                values[node.targets[0].id] = node.value.value
        if isinstance(values.get("NAME"), str):
            found[values["NAME"]] = (f"headwise.specimens.{path.stem}", str(values.get("SUMMARY", "")))
    return found


def specimen_names() -> list[str]:
    """The names that `load_specimen` knows, without their checkpoints."""
    return sorted(_modules())


def specimen_summaries() -> dict[str, str]:
    """Name -> what the specimen is, in a line."""
    return {name: summary for name, (_, summary) in sorted(_modules().items())}


def _module(name: str) -> Any:
    if name not in _modules():
        near = difflib.get_close_matches(name, _modules(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(specimen_names())}"
        raise InputError(f"specimen {name!r} is not known; {hint}")
    return importlib.import_module(_modules()[name][0])


def specimen_checkpoints(name: str) -> list[int]:
    """The training steps that are stored along the way; load one as `name@step`."""
    _module(name)
    return sorted(int(path.stem.removeprefix("step-")) for path in (WEIGHTS / name).glob("step-*.safetensors"))


def load_specimen(name: str, *, dtype: Any = None) -> Specimen:
    """Load a specimen in evaluation mode. `name@step` is a checkpoint along its training. dtype: None is float32.

    Raises InputError for an unknown name or step, and for a specimen whose weights were not made yet.
    """
    import torch

    base, _, at = name.partition("@")
    module = _module(base)
    dtype = torch.float32 if dtype is None else dtype
    if hasattr(module, "build") and hasattr(module, "card"):
        if at:
            raise InputError(f"specimen {base!r} is written by hand and has no checkpoints; leave out {'@' + at!r}")
        return Specimen(base, module.build().to(dtype), word_tokenizer(module.names()), module.card())
    folder = WEIGHTS / base
    if not (folder / "config.json").exists():
        raise InputError(f"specimen {base!r} has no weights in {folder}; make them with `headwise train {base}`")
    return read_specimen(folder, base, at, dtype)


def read_specimen(folder: Path, name: str, at: str = "", dtype: Any = None) -> Specimen:
    """A specimen from a folder that `train_specimen` wrote."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    written_for = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, written_for).from_pretrained(
        folder, dtype=torch.float32 if dtype is None else dtype, local_files_only=True, use_safetensors=True
    )
    step = None
    if at:
        steps = sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))
        if not at.isdigit() or int(at) not in steps:
            raise InputError(
                f"specimen {name!r} has no checkpoint {at!r}; expected one of {', '.join(map(str, steps)) or 'none'}"
            )
        step = int(at)
        state = {key: value.to(model.dtype) for key, value in load_file(folder / f"step-{step}.safetensors").items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise InputError(
                f"checkpoint {folder}/step-{step}.safetensors does not fit its model; train the specimen again"
            )
    card = folder / "card.json"
    heads = folder / "heads.json"
    return Specimen(
        name,
        model.eval(),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        json.loads(card.read_text(encoding="utf-8")) if card.exists() else {},
        heads if heads.exists() and step is None else None,
        folder,
        step,
        _processor(folder),
    )


def _processor(folder: Path) -> Any:
    """What takes pictures and text, where the folder has one and pillow is installed."""
    if not (folder / "processor_config.json").exists() or importlib.util.find_spec("PIL") is None:
        return None
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def train_specimen(
    name: str,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Path:
    """Make a specimen again from nothing and write it to `out`; None means the package's own weights.

    Hand-built specimens are just written. options: passed to the specimen's own `train` (such as `steps`).
    Returns the folder. It is replaced only when everything is written.
    """
    module = _module(name)
    return Path(module.train(WEIGHTS / name if out is None else Path(out), seed=seed, log=log, **options))


def word_tokenizer(names: Sequence[str]) -> Any:
    """A tokenizer for which a token is a word between spaces. BOS (`<bos>`) is put in front, as the models expect."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: index for index, name in enumerate(names)}
    unknown = "<unk>" if "<unk>" in vocabulary else "."
    if unknown not in vocabulary:
        unknown = names[-1]
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    special = {"bos_token": "<bos>", "unk_token": unknown}
    if "<pad>" in vocabulary:
        special["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False, **special)


def write_specimen(
    out: Path,
    model: Any,
    tokens: Any,
    card: dict[str, Any],
    name: str,
    checkpoints: dict[Any, dict[str, Any]] | None = None,
) -> Path:
    """Write model (bfloat16 where it was trained), tokenizer, card and checkpoints; the folder appears whole or not.

    tokens: a tokenizer, a processor with one in it, or the words of `word_tokenizer`.
    checkpoints: other weights, by training step or by another name ("seed-1").
    A `heads.json` of an earlier training is not kept: it described other weights.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    import headwise

    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    built = card.get("seed") is None
    card = {
        "schema": 1,
        "name": name,
        **card,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": "float32" if built else "bfloat16",
        "versions": {
            "headwise": headwise.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary) / "made"
        stored = model if built else model.to(torch.bfloat16)
        stored.save_pretrained(made)
        (tokens if hasattr(tokens, "save_pretrained") else word_tokenizer(tokens)).save_pretrained(made)
        for step, state in sorted((checkpoints or {}).items()):
            file = step if isinstance(step, str) else f"step-{step}"
            save_file(
                {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()},
                made / f"{file}.safetensors",
            )
        (made / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            if not (out / "card.json").exists() and any(out.iterdir()):
                raise InputError(
                    f"{out} is not empty and holds no specimen; choose another folder to write {name!r} to"
                )
            shutil.rmtree(out)
        os.replace(made, out)
    return out
