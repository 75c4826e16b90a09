"""Effects of nodes on what a model says: the metrics, the nodes and receivers by name, and the table of effects.

A node is a query head (``Head(9, 6)`` or "9.6") or an MLP ("mlp:3"). A receiver is "logits", an MLP, or the queries,
keys or values of a head ("9.6.q"). A metric is a function of the logits at one position, `[... b v] -> [... b]`.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

import headwise
from headwise._files import read_json, write_text
from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError

__all__ = ["Metric", "NodeEffects", "Receiver", "centred_logit", "log_probability", "logit_difference", "probability"]

Metric = Callable[[Tensor], Tensor]
Node = Head | str
Normalise = Literal["corrupt", "clean", "none"]
Part = Literal["logits", "q", "k", "v", "mlp"]

MLP = re.compile(r"mlp:([0-9]+)")
RECEIVER = re.compile(r"(.+)\.([qkv])")
SCHEMA = 1


def logit_difference(right: Int[Tensor, " b"], wrong: Int[Tensor, " b"]) -> Metric:
    """Logit of the right answer minus that of the wrong one: right 3.2 and wrong 1.0 give 2.2.

    Raises ValueError where an answer is its own counterpart.
    """
    right, wrong = _tokens("logit_difference", "right", right), _tokens("logit_difference", "wrong", wrong)
    _same_count("logit_difference", right, wrong)
    if bool((right == wrong).any()):
        row = int((right == wrong).int().argmax())
        raise ValueError(
            f"logit_difference: prompt {row} has token {int(right[row])} as right and as wrong answer; their "
            "difference is 0 whatever the model does, give two answers"
        )
    return lambda logits: _pick("logit_difference", logits, right) - _pick("logit_difference", logits, wrong)


def centred_logit(right: Int[Tensor, " b"], among: Int[Tensor, "b k"]) -> Metric:
    """Logit of the right answer minus the mean logit of all k candidates (the right one among them).

    A head that raises all candidates alike counts nothing. Raises ValueError for fewer than two candidates, for a
    candidate given twice, and where the right answer is none of them.
    """
    right, among = _tokens("centred_logit", "right", right), torch.as_tensor(among).long()
    if among.ndim != 2 or among.shape[0] != len(right) or among.shape[1] < 2:
        raise ValueError(
            f"centred_logit: among has shape {tuple(among.shape)} for {len(right)} prompts; give [b, k] with k >= 2"
        )
    if bool((among.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ValueError("centred_logit: a prompt has one candidate twice; candidates must differ")
    if not bool((among == right[:, None]).any(1).all()):
        raise ValueError("centred_logit: a right answer is not among its candidates; add it")

    def metric(logits: Tensor) -> Tensor:
        index = _checked("centred_logit", logits, len(right))
        candidates = logits.gather(-1, among.to(logits.device).expand(*index, -1))
        return _pick("centred_logit", logits, right) - candidates.mean(-1)

    return metric


def log_probability(right: Int[Tensor, " b"]) -> Metric:
    """Log-probability of the right answer, in nats; 0 is certainty."""
    right = _tokens("log_probability", "right", right)
    return lambda logits: _pick("log_probability", logits.float().log_softmax(-1), right)


def probability(right: Int[Tensor, " b"]) -> Metric:
    """Probability of the right answer, 0 to 1."""
    right = _tokens("probability", "right", right)
    return lambda logits: _pick("probability", logits.float().softmax(-1), right)


def _tokens(where: str, name: str, given: Any) -> Int[Tensor, " b"]:
    ids = torch.as_tensor(given)
    if ids.ndim != 1 or ids.is_floating_point() or not len(ids):
        raise ValueError(f"{where}: {name} has shape {tuple(ids.shape)} of {ids.dtype}; give one token id per prompt")
    return ids.long()


def _same_count(where: str, right: Tensor, wrong: Tensor) -> None:
    if len(right) != len(wrong):
        raise ValueError(f"{where}: {len(right)} right and {len(wrong)} wrong answers; give one of each per prompt")


def _checked(where: str, logits: Tensor, count: int) -> torch.Size:
    if logits.ndim < 2 or logits.shape[-2] != count:
        raise ValueError(f"{where}: answers of {count} prompts but logits {tuple(logits.shape)}; expected [... b v]")
    return logits.shape[:-1]


def _pick(where: str, logits: Tensor, ids: Tensor) -> Tensor:
    shape = _checked(where, logits, len(ids))
    if int(ids.max()) >= logits.shape[-1] or int(ids.min()) < 0:
        raise ValueError(f"{where}: token {int(ids.max())} but the model knows 0 to {logits.shape[-1] - 1}")
    return logits.gather(-1, ids.to(logits.device).expand(shape)[..., None])[..., 0]


@dataclass(frozen=True)
class Receiver:
    """What a path ends in. part "q", "k" or "v" of a head, "mlp" of a layer, or "logits"."""

    part: Part
    head: Head | None = None
    layer: int | None = None

    def __str__(self) -> str:
        if self.head is not None:
            return f"{self.head}.{self.part}"
        return "logits" if self.layer is None else f"mlp:{self.layer}"

    @classmethod
    def parse(cls, text: "str | Receiver") -> "Receiver":
        """Read "logits", "9.6.q" or "mlp:3". Raises ValueError for anything else."""
        if isinstance(text, Receiver):
            return text
        if text == "logits":
            return cls("logits")
        if match := MLP.fullmatch(text):
            return cls("mlp", layer=int(match[1]))
        if match := RECEIVER.fullmatch(text):
            head = Head.parse(match[1])
            return cls(match[2], head, head.layer)  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"receiver: {text!r} is none; give logits, an MLP such as mlp:3, or queries, keys or values of a head, as "
            "in 9.6.q"
        )

    @property
    def depth(self) -> float:
        """Where in the model it reads: heads of layers below this can send to it."""
        return math.inf if self.layer is None else self.layer + (0.5 if self.part == "mlp" else 0.0)


def parse_nodes(where: str, nodes: Iterable[Node], layout: Layout) -> tuple[list[Head], list[int]]:
    """The heads and the MLP layers among nodes. Raises ValueError for a node given twice or that is not there."""
    heads: list[Head] = []
    mlps: list[int] = []
    for node in [nodes] if isinstance(nodes, str | Head) else nodes:
        match = MLP.fullmatch(node) if isinstance(node, str) else None
        if match is not None:
            layer = int(match[1])
            if layer >= layout.main.layers:
                raise ValueError(f"{where}: {node} but the model has layers 0 to {layout.main.layers - 1}")
            if layer in mlps:
                raise ValueError(f"{where}: {node} is given twice; give every node once")
            mlps.append(layer)
            continue
        head = layout.check(Head.parse(node) if isinstance(node, str) else node)
        if head.tower != layout.main.name:
            raise ValueError(f"{where}: head {head} is of another tower; effects are of the main tower's heads")
        if head in heads:
            raise ValueError(f"{where}: head {head} is given twice; give every node once")
        heads.append(head)
    return heads, mlps


@dataclass(frozen=True)
class NodeEffects:
    """What patching each node does to the metric, prompt by prompt.

    heads: metric after patching minus the clean metric; nan where the head was no sender. mlps: the same for MLPs, None
    where none was asked for. clean, corrupt: the metric of the two runs. about: how it was measured.
    """

    heads: Float[Tensor, "b l h"]
    mlps: Float[Tensor, "b l"] | None
    clean: Float[Tensor, " b"]
    corrupt: Float[Tensor, " b"]
    layout: Layout
    model: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def map(self, normalise: Normalise = "corrupt", name: str = "effect") -> HeadMap:
        """Mean effect over prompts as a head map.

        normalise: "corrupt" divides by mean(corrupt) - mean(clean): 1 is all of what the corrupt prompt does, and the
        paper's per cent of the logit difference are -100 times that; "clean" divides by the mean clean metric; "none"
        leaves the metric's own unit. Raises ValueError where that number is 0, up to rounding.
        """
        unit = self.unit(normalise)
        means = self.heads.double().mean(0)
        scores = {
            head: float(means[head.layer, head.head]) / unit
            for head in self.layout.heads()
            if not math.isnan(float(means[head.layer, head.head]))
        }
        return HeadMap({name: scores}, self.layout, model=self.model, source=str(self.about.get("how", "patching")))

    def mean_mlps(self, normalise: Normalise = "corrupt") -> dict[int, float]:
        """Mean effect of every MLP that was patched, by layer; empty where none was."""
        if self.mlps is None:
            return {}
        unit, means = self.unit(normalise), self.mlps.double().mean(0)
        return {layer: float(value) / unit for layer, value in enumerate(means) if not math.isnan(float(value))}

    def unit(self, normalise: Normalise) -> float:
        """The number that effects are divided by."""
        if normalise == "none":
            return 1.0
        if normalise not in ("corrupt", "clean"):
            raise ValueError(f"NodeEffects: normalise is {normalise!r}; choose corrupt, clean or none")
        clean, corrupt = float(self.clean.double().mean()), float(self.corrupt.double().mean())
        unit = corrupt - clean if normalise == "corrupt" else clean
        scale = max(float(self.clean.double().abs().mean()), float(self.corrupt.double().abs().mean()))
        if not abs(unit) > 1e-6 * scale:
            what = f"means {clean:.4g} (clean) and {corrupt:.4g} (corrupt)"
            raise ValueError(
                f"NodeEffects: the metric has {what}, so effects cannot be divided by "
                f"{'their difference' if normalise == 'corrupt' else 'the clean one'}; use normalise='none', or "
                "prompts that differ"
            )
        return unit

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON; what was not patched is null."""
        document = {
            "headwise": headwise.__version__,
            "schema": SCHEMA,
            "kind": "node effects",
            "model": self.model,
            "towers": self.layout.to_json(),
            "about": dict(self.about),
            "clean": self.clean.tolist(),
            "corrupt": self.corrupt.tolist(),
            "heads": _plain(self.heads.tolist()),
            "mlps": None if self.mlps is None else _plain(self.mlps.tolist()),
        }
        write_text(path, json.dumps(document, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NodeEffects":
        """Read what `save` wrote. Raises InputError for a missing file and for one of another kind."""
        document = read_json(path)
        if not isinstance(document, dict) or document.get("kind") != "node effects":
            raise InputError(f"{os.fspath(path)}: holds no node effects; give a file that NodeEffects.save wrote")
        if document.get("schema") != SCHEMA:
            raise InputError(f"{os.fspath(path)}: has schema {document.get('schema')!r}; this headwise reads {SCHEMA}")
        return cls(
            _tensor(document["heads"]),
            None if document["mlps"] is None else _tensor(document["mlps"]),
            torch.tensor(document["clean"]),
            torch.tensor(document["corrupt"]),
            Layout.from_json(document["towers"]),
            document["model"],
            document["about"],
        )


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if math.isnan(value) else value


def _tensor(value: Any) -> Tensor:
    def back(part: Any) -> Any:
        return [back(inner) for inner in part] if isinstance(part, Sequence) else math.nan if part is None else part

    return torch.tensor(back(value))
