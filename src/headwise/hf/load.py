"""Load a model by what a person writes: a specimen's name, a local folder, or an id on the Hugging Face hub.

Weights come from safetensors only and no code of a checkpoint is run. What cannot be loaded is an `InputError` of one
line. Names that are neither folders nor hub ids are known through `register`, so that this file knows no specimen.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from headwise.errors import InputError, UnsupportedModel

# `load` and the `register`s are taken from this module: an area exports no name that one of its modules has.
__all__ = ["Loaded", "known_names"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# For checkpoints that do not say their class: the heads that fit a model's type, the most telling first.
MAPPINGS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_MAPPING,
)


@dataclass
class Loaded:
    """A model in evaluation mode with what stands beside it; ``head_map`` is the path of a shipped head map."""

    model: nn.Module
    tokenizer: Any = None
    name: str = ""
    processor: Any = None
    head_map: Path | None = None
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Resolver:
    names: Callable[[], Iterable[str]]
    load: Callable[..., Any]


_RESOLVERS: dict[str, _Resolver] = {}
_FAMILIES: dict[str, Callable[[str, str], type[PreTrainedModel]]] = {}


def register(names: Callable[[], Iterable[str]], load: Callable[..., Any]) -> None:
    """Make names known to `load`. Registering the same functions again changes nothing.

    names: lists the names. load: ``load(name, dtype=...)`` gives an object with ``model`` and ``tokenizer`` and, where
    it has them, ``processor``, ``head_map`` and ``card``; it also gets ``name@rest`` where ``name`` is one of its own.
    """
    _RESOLVERS[f"{load.__module__}.{load.__qualname__}"] = _Resolver(names, load)


def register_family(prefix: str, find: Callable[[str, str], type[PreTrainedModel]]) -> None:
    """Let `load` read checkpoints whose ``model_type`` starts with a prefix, which transformers does not know.

    find: (model_type, the class that the checkpoint names) -> that class.
    """
    _FAMILIES[prefix] = find


def known_names() -> list[str]:
    """Every name that `register` has made known."""
    return sorted(name for resolver in _RESOLVERS.values() for name in resolver.names())


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Loaded:
    """A model and its tokenizer or processor, ready to be scanned.

    name: a registered name, a folder written by ``save_pretrained``, or a hub id. A registered name wins over a folder;
    ``./name`` is always a folder. device: None means the GPU where there is one. dtype: None means float32 on the CPU,
    where it is fast and exact, and the checkpoint's own elsewhere.
    Raises InputError for what cannot be found or read, UnsupportedModel for a class off the attention interface.
    """
    text = os.fspath(name)
    place = _device(device)
    precision = _dtype(dtype, place)
    base = text.partition("@")[0]
    for resolver in _RESOLVERS.values():
        if base in resolver.names():
            return _resolved(resolver, text, place, precision)
    folder = Path(text).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return _pretrained(str(folder), text, place, precision, local=True)
    if folder.is_file():
        raise InputError(f"model: {text} is a file; give the folder that holds it and its config.json")
    if not HUB_ID.fullmatch(text):
        raise InputError(f"model: there is no folder {text}{_advice(text)}")
    return _pretrained(text, text, place, precision, local=False)


def _resolved(resolver: _Resolver, name: str, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    found = resolver.load(name, dtype=dtype)
    return Loaded(
        model=found.model.to(device).eval(),
        tokenizer=found.tokenizer,
        name=name,
        processor=getattr(found, "processor", None),
        head_map=getattr(found, "head_map", None),
        card=getattr(found, "card", None) or {},
    )


def _pretrained(source: str, name: str, device: torch.device, dtype: torch.dtype | None, *, local: bool) -> Loaded:
    written, _ = _attempt(lambda: PreTrainedConfig.get_config_dict(source), name, local)
    own = next((find for prefix, find in _FAMILIES.items() if str(written.get("model_type")).startswith(prefix)), None)
    if own is None:
        config = _attempt(lambda: AutoConfig.from_pretrained(source, trust_remote_code=False), name, local)
        model_class = _model_class(config, name)
    else:
        model_class = own(written["model_type"], next(iter(written.get("architectures") or []), ""))
        reads: Any = model_class.config_class
        config = _attempt(lambda: reads.from_pretrained(source), name, local)
    options = {"config": config, "use_safetensors": True, "dtype": dtype or "auto", "output_loading_info": True}
    model, info = _attempt(lambda: model_class.from_pretrained(source, **options), name, local)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"model: the weights of {name} lack {len(missing)} tensors of {model_class.__name__} ({missing[0]}, ...), "
            "which would be random; save the whole model with save_pretrained"
        )
    processor = _beside(transformers.AutoProcessor, source, local, PROCESSORS)
    if processor is None:
        processor = _beside(transformers.AutoImageProcessor, source, local, PROCESSORS)
    tokenizer = getattr(processor, "tokenizer", None) or _beside(transformers.AutoTokenizer, source, local, TOKENIZERS)
    return Loaded(model=model.to(device).eval(), tokenizer=tokenizer, name=name, processor=processor)


def _model_class(config: Any, name: str) -> type[PreTrainedModel]:
    """The class that the checkpoint names, else one that fits its type."""
    named = list(getattr(config, "architectures", None) or [])
    found: Any = getattr(transformers, named[0], None) if named else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        if named and getattr(config, "auto_map", None):
            raise InputError(
                f"model: {name} is a {named[0]}, which comes with code of its own; headwise runs none, "
                "load it yourself and give the model to headwise in Python"
            )
        found = next((mapping[type(config)] for mapping in MAPPINGS if type(config) in mapping), None)
        found = found[0] if isinstance(found, tuple) else found
    if found is None:
        raise InputError(f"model: {name} has type {config.model_type!r}, for which transformers has no model class")
    if not found._can_set_attn_implementation():
        raise UnsupportedModel(
            f"model: {name} is a {found.__name__}, which does not go through transformers' attention interface, so its "
            "heads can be neither read nor edited; use a model of another family, such as Llama, Qwen, GPT-2 or ViT"
        )
    return found


def _check_folder(folder: Path) -> None:
    """Refuse folders that cannot be loaded safely before anything is read from them."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    if "config.json" not in files:
        wrong = "holds an adapter without its model" if "adapter_config.json" in files else "has no config.json"
        advice = (
            "merge it into the model and save that" if "adapter" in wrong else "give one that save_pretrained wrote"
        )
        raise InputError(f"model: the folder {folder} {wrong}; {advice}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: {folder / 'config.json'} cannot be read ({error}); write it anew") from None
    if any(name.endswith(".safetensors") for name in files):
        return
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    if pickles:
        raise InputError(
            f"model: {folder} holds its weights as {pickles[0]}, which can run code when it is read; headwise reads "
            "safetensors only, save it again with model.save_pretrained where you trust it"
        )
    raise InputError(f"model: {folder} holds no weights; a *.safetensors file is expected beside its config.json")


def _attempt(read: Callable[[], Any], name: str, local: bool) -> Any:
    """Run a transformers loader; what it raises becomes one line."""
    try:
        return read()
    except Exception as error:
        # Anything may come from a damaged file or a network; a person is helped by its first line, not by its trace.
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise InputError(
                f"model: {name} does not fit into memory; give dtype bfloat16 or a smaller model"
            ) from None
        if local:
            raise InputError(f"model: the folder {name} cannot be loaded: {first}") from None
        if "safetensors" in first:
            raise InputError(
                f"model: {name} has no safetensors weights on the hub; headwise reads no pickles, convert it first"
            ) from None
        offline = " (the hub is switched off by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"model: {name!r} is no folder{_advice(name)}; nor could it be had from the hub{offline}: {_short(first)}"
        ) from None


def _short(line: str) -> str:
    return line if len(line) <= 160 else f"{line[:157]}..."


def _advice(name: str) -> str:
    names = known_names()
    if not names:
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f" and none of the specimens {', '.join(names)}"


def _beside(auto: Any, source: str, local: bool, files: tuple[str, ...]) -> Any:
    """What stands beside the weights, or None where it is not there or not readable here."""
    if local and not any((Path(source) / file).exists() for file in files):
        return None
    try:
        return auto.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError):
        return None


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise InputError(f"device: {str(device)!r} is none that torch knows; try cpu, cuda or cuda:1") from None


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype: {str(dtype)!r} is none to run a model in; try float32, bfloat16 or float16")
    return found
