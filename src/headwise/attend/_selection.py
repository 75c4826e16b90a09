"""Reads the items of a selection of heads; the grammar stands in `headwise.attend.addresses`."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from headwise._files import read_json
from headwise.attend.addresses import TOWER, Head, Layout, Scores, nearest, room
from headwise.errors import InputError

__all__ = ["Items"]

_RANGE = r"[0-9]+-[0-9]+|[0-9]+|\*"
_GRID = re.compile(rf"({_RANGE})\.({_RANGE})")
_THRESHOLD = re.compile(r"(.+?)\s*(>=|<)\s*([^<>=]+)")
_WORDS = ("top", "bottom", "random")
_FORMS = (
    "3.1, 0-2.*, vision:1.0, all, top:PROBE:K, bottom:PROBE:K, PROBE>=X, PROBE<X, random:K[:SEED], @file.json[#PROBE]"
)


class Items:
    """Reads single items of a selection for one layout."""

    def __init__(
        self, layout: Layout, scores: Callable[[str], Scores] | Mapping[str, Scores] | None, seed: int
    ) -> None:
        self.layout, self.scores, self.seed, self.why_empty = layout, scores, seed, ""

    def read(self, item: str, chosen: list[Head], named: set[Head]) -> list[Head]:
        tower, body = None, item
        prefix, colon, rest = item.partition(":")
        if colon and prefix not in _WORDS and re.fullmatch(rf"{TOWER}|\*", prefix) and _is_item(rest):
            tower, body = prefix, rest
            if tower != "*":
                tower = self.layout.tower(tower).name
        word, *arguments = body.split(":")
        if body == "all":
            return self.layout.heads(tower)
        if match := _GRID.fullmatch(body):
            return self._grid(item, tower, match[1], match[2])
        if body.startswith("@") and not _THRESHOLD.fullmatch(body):
            return self._file(body, tower)
        if word in ("top", "bottom") and len(arguments) >= 2:
            return self._extreme(item, tower, word, ":".join(arguments[:-1]), arguments[-1])
        if word == "random" and len(arguments) in (1, 2):
            return self._random(item, tower, arguments, chosen, named)
        if match := _THRESHOLD.fullmatch(body):
            return self._threshold(item, tower, match[1], match[2], match[3])
        raise ValueError(f"heads: {item!r} cannot be read; expected one of {_FORMS}{nearest(word, [*_WORDS, 'all'])}")

    def _grid(self, item: str, tower: str | None, layers: str, heads: str) -> list[Head]:
        towers = self.layout.towers if tower == "*" else (self.layout.tower(tower),)
        found: list[Head] = []
        for t in towers:
            rows = _numbers(layers, t.layers, f"heads: {item!r}: layer", t.name)
            if "-" not in layers and "*" not in layers and t.heads[rows[0]] == 0:
                raise ValueError(f"heads: {item!r}: layer {rows[0]} has no attention heads; choose another layer")
            widest = max((t.heads[row] for row in rows), default=0)
            where = f"layer {layers}" if layers.isdigit() else "the widest of these layers"
            columns = _numbers(heads, widest, f"heads: {item!r}: head", where)
            found += [self.layout.check(Head(row, c, t.name)) for row in rows for c in columns if c < t.heads[row]]
        return found

    def _scores(self, probe: str, tower: str | None) -> dict[Head, float]:
        table = self._table(probe)
        inside = set(self.layout.heads(tower))
        checked = {self.layout.check(head): score for head, score in table.items()}
        return {h: score for h, score in checked.items() if h in inside and score is not None and score == score}

    def _table(self, probe: str) -> Scores:
        if probe.startswith("@"):
            path, _, name = probe[1:].partition("#")
            from headwise.attend.head_map import HeadMap  # head maps are made of addresses

            return HeadMap.read(path, self.layout).of(name or None)
        if self.scores is None:
            raise ValueError(f"heads: {probe!r} needs scores; give a head map (--map heads.json), or heads by address")
        known: Iterable[str] = ()
        try:
            if isinstance(self.scores, Mapping):
                known = self.scores
                return self.scores[probe]
            return self.scores(probe)
        except KeyError:
            if not known:
                from headwise.attend.probes import PROBES  # probes read heads

                known = PROBES
        raise ValueError(f"probe: {probe!r} is unknown; there are {', '.join(known)}{nearest(probe, known)}")

    def _extreme(self, item: str, tower: str | None, word: str, probe: str, k: str) -> list[Head]:
        count = _count(item, k)
        table = self._scores(probe, tower)
        if count > len(table):
            raise ValueError(f"heads: {item!r} asks for {count} heads but {len(table)} have a score; ask for fewer")
        sign = -1 if word == "top" else 1
        return sorted(table, key=lambda head: (sign * table[head], head))[:count]

    def _threshold(self, item: str, tower: str | None, probe: str, sign: str, value: str) -> list[Head]:
        limit = _number(value)
        if limit != limit:
            raise ValueError(f"heads: {item!r}: {value.strip()!r} is no number; expected PROBE>=X, as in sink>=0.5")
        table = self._scores(probe, tower)
        found = [head for head in sorted(table) if (table[head] >= limit) == (sign == ">=")]
        if not found and table:
            best = (max if sign == ">=" else min)(table, key=lambda head: table[head])
            self.why_empty = f" ({'highest' if sign == '>=' else 'lowest'} {probe}: {table[best]:.3g}, head {best})"
        return found

    def _random(
        self, item: str, tower: str | None, arguments: list[str], chosen: list[Head], named: set[Head]
    ) -> list[Head]:
        count = _count(item, arguments[0])
        if len(arguments) == 2 and not arguments[1].isdecimal():
            raise ValueError(f"heads: {item!r}: seed is {arguments[1]!r}; expected an integer >= 0")
        draw = random.Random(int(arguments[1]) if len(arguments) == 2 else self.seed)
        inside = self.layout.heads(tower)
        pool = [head for head in inside if head not in named]
        places = Counter((head.tower, head.layer) for head in chosen if head in set(inside))
        if not places:
            if count > len(pool):
                raise ValueError(f"heads: {item!r} asks for {count} heads but {len(pool)} are left; ask for fewer")
            return sorted(draw.sample(pool, count))
        found: list[Head] = []
        for (name, layer), share in sorted(_shares(places, count).items()):
            left = [head for head in pool if (head.tower, head.layer) == (name, layer)]
            if share > len(left):
                raise ValueError(
                    f"heads: {item!r} needs {share} other heads in layer {layer}, to match the layers of what stands "
                    f"before it, but {len(left)} are left there; ask for fewer, or put it first to draw from all layers"
                )
            found += draw.sample(left, share)
        return sorted(found)

    def _file(self, body: str, tower: str | None) -> list[Head]:
        path = body[1:].partition("#")[0]
        document = read_json(path)
        listed = document.get("heads") if isinstance(document, dict) and "probes" not in document else document
        if isinstance(listed, list):
            if not all(isinstance(entry, str) for entry in listed):
                raise InputError(f'{path}: not a list of heads; expected addresses such as ["12.3", "vision:3.1"]')
            found = [self.layout.check(Head.parse(entry)) for entry in listed]
            return [head for head in found if tower in (None, "*", head.tower)]
        table = self._scores(body, tower)
        return sorted((head for head in table if table[head] > 0), key=lambda head: (-table[head], head))


def _is_item(text: str) -> bool:
    """Whether a text could stand after the name of a tower; tells "vision:1.0" from a mistyped "tpo:sink:3"."""
    forms = text == "all" or text.startswith("@") or _GRID.fullmatch(text) or _THRESHOLD.fullmatch(text)
    return bool(forms) or text.partition(":")[0] in _WORDS


def _numbers(text: str, count: int, where: str, owner: str) -> list[int]:
    if text == "*":
        return list(range(count))
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if low > high:
        raise ValueError(f"{where}s {text} run backwards; write {high}-{low}")
    if high >= count:
        raise ValueError(f"{where} {high} is out of range; {room(where.rsplit(' ', 1)[1], count, owner)}")
    return list(range(low, high + 1))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _count(item: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"heads: {item!r}: the number of heads is {text!r}; expected an integer >= 1")
    return int(text)


def _shares(places: Counter[tuple[str, int]], count: int) -> dict[tuple[str, int], int]:
    """Split `count` over places in proportion to their counts, by largest remainder."""
    total = places.total()
    shares = {place: count * n // total for place, n in places.items()}
    by_remainder = sorted(places, key=lambda place: (-(count * places[place] % total), place))
    for place in by_remainder[: count - sum(shares.values())]:
        shares[place] += 1
    return shares
