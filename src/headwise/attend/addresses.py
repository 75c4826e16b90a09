"""Addresses of heads, the layout of a model's heads, and the selection grammar.

A head is written ``[tower:]layer.head``: "12.3", "vision:3.1". A selection is a comma-separated list of items:

    3.1  0-2.*  vision:*.0-3       heads of a grid; ranges include both ends, * is all
    all  vision:all                every head of a tower
    top:PROBE:K  bottom:PROBE:K    the K heads with the highest or lowest score
    PROBE>=X  PROBE<X              the heads whose score passes the threshold
    random:K[:SEED]                K random heads, spread over layers as the heads that earlier items chose,
                                   never one that an earlier item named
    @file.json[#PROBE]             the heads that a file lists, or those with a positive score in a head map
    !ITEM                          removes the heads of ITEM from what earlier items chose

Items without a tower mean the main tower. Where a PROBE stands, ``@file.json#PROBE`` takes the scores from a file. A
selection that only removes starts from all heads of the main tower.
"""

import difflib
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Head", "Layout", "Tower", "pick_layers", "select_heads"]

TOWER = r"[A-Za-z][A-Za-z0-9_-]*"
_ADDRESS = re.compile(rf"(?:({TOWER}):)?([0-9]+)\.([0-9]+)")

Scores = Mapping["Head", float | None]


@functools.total_ordering
@dataclass(frozen=True)
class Head:
    """One query head of one attention module: ``Head(12, 3)`` is "12.3".

    layer: index of the attention module in its tower. tower: "" for the text decoder of a causal language model and for
    models with one tower. key: the grouped key head it reads, when known; it takes no part in equality.
    """

    layer: int
    head: int
    tower: str = ""
    key: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            value = getattr(self, name)
            try:
                index = -1 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                index = -1
            if index < 0:
                raise ValueError(f"Head: {name} is {value!r}; expected an integer >= 0, as in Head(12, 3)")
            object.__setattr__(self, name, index)
        if self.tower and not re.fullmatch(TOWER, self.tower):
            raise ValueError(f"Head: tower is {self.tower!r}; expected a word such as 'vision', or '' for the main one")

    def __str__(self) -> str:
        return f"{self.tower}:{self.layer}.{self.head}" if self.tower else f"{self.layer}.{self.head}"

    def __lt__(self, other: "Head") -> bool:
        if not isinstance(other, Head):
            return NotImplemented
        return (self.tower, self.layer, self.head) < (other.tower, other.layer, other.head)

    @classmethod
    def parse(cls, text: str) -> "Head":
        """Read "12.3" or "vision:3.1". Raises ValueError for anything else."""
        match = _ADDRESS.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"head: {text!r} is no address; expected [tower:]layer.head, as in 12.3 or vision:3.1")
        return cls(int(match[2]), int(match[3]), match[1] or "")


@dataclass(frozen=True)
class Tower:
    """The heads of one tower: how many query and key heads each layer has (0: a layer without attention)."""

    name: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.name and not re.fullmatch(TOWER, self.name):
            raise ValueError(f"Tower: name is {self.name!r}; expected a word such as 'vision', or '' for the main one")
        if len(self.heads) != len(self.kv_heads):
            raise ValueError(
                f"Tower {self.name!r}: heads has {len(self.heads)} layers but kv_heads has {len(self.kv_heads)}; "
                "they must match"
            )
        for layer, (heads, keys) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            if heads < 0 or keys < 0 or bool(heads) != bool(keys) or (keys and heads % keys):
                raise ValueError(
                    f"Tower {self.name!r}: layer {layer} has {heads} query heads and {keys} key heads; "
                    "the first must be a multiple of the second, or both 0"
                )

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True)
class Layout:
    """The heads of a model, tower by tower; the main tower first."""

    towers: tuple[Tower, ...]

    def __post_init__(self) -> None:
        names = [tower.name for tower in self.towers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Layout: towers are named {names}; expected at least one tower, each with its own name")

    @classmethod
    def of(cls, heads: Sequence[int], kv_heads: Sequence[int] | None = None, name: str = "") -> "Layout":
        """A layout of one tower from its heads per layer; kv_heads None means as many as query heads."""
        return cls((Tower(name, tuple(heads), tuple(heads if kv_heads is None else kv_heads)),))

    @property
    def main(self) -> Tower:
        return self.towers[0]

    def tower(self, name: str | None) -> Tower:
        """A tower by its name; None and "" mean the main one. Raises ValueError for a name the model has not."""
        for tower in self.towers:
            if name == tower.name:
                return tower
        if not name:
            return self.main
        names = [tower.name or "the unnamed main tower" for tower in self.towers]
        raise ValueError(f"tower: {name!r} is none of this model's; it has {', '.join(names)}{nearest(name, names)}")

    def heads(self, tower: str | None = None) -> list[Head]:
        """Every head in order, with its key head. None: of the main tower; "*": of all towers."""
        towers = self.towers if tower == "*" else (self.tower(tower),)
        return [
            Head(layer, head, t.name, key=head // (t.heads[layer] // t.kv_heads[layer]))
            for t in towers
            for layer in range(t.layers)
            for head in range(t.heads[layer])
        ]

    def check(self, head: Head) -> Head:
        """The head as this model has it, tower and key head filled in. Raises ValueError when it has no such head."""
        tower = self.tower(head.tower)
        where = f"head {head}"
        if head.layer >= tower.layers:
            raise ValueError(f"{where}: layer {head.layer} is out of range; {room('layer', tower.layers, tower.name)}")
        heads = tower.heads[head.layer]
        if head.head >= heads:
            raise ValueError(
                f"{where}: layer {head.layer} has no attention heads; choose another layer"
                if heads == 0
                else f"{where}: head {head.head} is out of range; {room('head', heads, f'layer {head.layer}')}"
            )
        return Head(head.layer, head.head, tower.name, key=head.head // (heads // tower.kv_heads[head.layer]))

    def to_json(self) -> list[dict[str, Any]]:
        """The ``towers`` list of headwise's documents."""
        return [
            {"name": t.name, "layers": t.layers, "heads_per_layer": list(t.heads), "kv_heads": list(t.kv_heads)}
            for t in self.towers
        ]

    @classmethod
    def from_json(cls, towers: Sequence[Mapping[str, Any]]) -> "Layout":
        """Read what `to_json` wrote. Raises ValueError for a list that is not of that form."""
        try:
            return cls(tuple(Tower(str(t["name"]), tuple(t["heads_per_layer"]), tuple(t["kv_heads"])) for t in towers))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"towers: not a list of {{name, layers, heads_per_layer, kv_heads}} ({type(error).__name__}: {error})"
            ) from None


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", or nothing when no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def room(what: str, count: int, where: str) -> str:
    """What there is to choose from, for messages: "layer 0 has 4 heads (0 to 3)"."""
    place = where or "the model"
    return f"{place} has {count} {what}{'s' * (count != 1)} (0 to {count - 1})" if count else f"{place} has no {what}s"


def select_heads(
    selection: str | Iterable[Head | str] | None,
    layout: Layout,
    *,
    scores: Callable[[str], Scores] | Mapping[str, Scores] | None = None,
    seed: int = 0,
) -> list[Head]:
    """The heads that a selection names, in the order in which it names them, each once.

    selection: a string in the grammar of this module, or heads and strings; None means all heads of the main tower.
    scores: gives the scores of a probe by its name, for items that use one.
    seed: of ``random`` items that give none.

    >>> [str(head) for head in select_heads("0.*,!0.1", Layout.of([3, 3]))]
    ['0.0', '0.2']

    Raises ValueError for items that cannot be read, heads out of range, unknown probes and strings that name no head.
    """
    if selection is None:
        return layout.heads()
    parts: list[Head | str] = []
    for part in [selection] if isinstance(selection, str) else selection:
        if isinstance(part, Head):
            parts.append(layout.check(part))
        elif isinstance(part, str):
            parts.extend(item.strip() for item in part.split(","))
        else:
            raise TypeError(f"heads: {part!r} is a {type(part).__name__}; expected a Head or a string such as '12.3'")
    from headwise.attend._selection import Items  # it is made of addresses

    reader = Items(layout, scores, seed)
    only_removals = bool(parts) and all(isinstance(part, str) and part.startswith("!") for part in parts)
    chosen: dict[Head, None] = dict.fromkeys(layout.heads() if only_removals else ())
    named: set[Head] = set()
    for part in parts:
        if isinstance(part, Head):
            found, removes = [part], False
        else:
            removes = part.startswith("!")
            found = reader.read(part[1:].strip() if removes else part, list(chosen), named)
        named.update(found)
        for head in found:
            if removes:
                chosen.pop(head, None)
            else:
                chosen[head] = None
    if isinstance(selection, str) and not chosen:
        raise ValueError(
            f"heads: {selection!r} names no head{reader.why_empty}; loosen it, or leave it out for all heads"
        )
    return list(chosen)


def pick_layers(layers: slice | Iterable[int] | None, count: int, where: str) -> list[int]:
    """Layer numbers, ascending and each once, of a slice, of numbers (negative ones from the end) or of None: all.

    >>> pick_layers(slice(2, -1), 6, "example")
    [2, 3, 4]

    Raises ValueError for numbers out of range, and where nothing is left.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        found = list(range(count))[layers]
    else:
        numbers = list(layers)
        wrong = [number for number in numbers if not -count <= number < count]
        if wrong:
            raise ValueError(f"{where}: layer {wrong[0]} is out of range; {room('layer', count, '')}")
        found = [number % count for number in numbers]
    if not found:
        raise ValueError(f"{where}: layers is {layers}, which leaves none; {room('layer', count, '')}")
    return sorted(set(found))
