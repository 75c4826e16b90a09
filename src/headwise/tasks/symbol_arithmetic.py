"""Arithmetic modulo ten in symbols, two operators in two templates, with letters to choose between as a control.

    a + b = c .      a - b = c .      sum a b is c .      diff a b is c .
    k < m = k .      k > m = m .      first k m is k .    last k m is m .

The control needs both operands and the operator, and calculates nothing. All tellings take as many tokens, and the two
templates put the operator and the first operand at different distances from the row that answers.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.tasks.episodes import Episodes, at, place

__all__ = ["ArithmeticSymbols", "answers_by_operator", "arithmetic_episodes"]

LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()  # noqa: SIM905 (reads better in a line)
WORDS = {"+": "sum", "-": "diff", "<": "first", ">": "last"}  # operator of `infix` -> of `prefix`
TEMPLATES = ("infix", "prefix")


class ArithmeticSymbols:
    """Token 0 is BOS, then ten digits, 26 letters, the operators of both templates, and marks."""

    bos = 0
    names: tuple[str, ...] = (
        "<bos>", *map(str, range(10)), *LETTERS, *WORDS, *WORDS.values(), "=", "is", ".", "<pad>",
    )  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: token for token, name in enumerate(self.names)}

    def ids(self, names: Sequence[str] | str) -> Int[Tensor, " n"]:
        """Ids of names, or of a line of names separated by spaces. Raises ValueError for a name that is none."""
        parts = names.split() if isinstance(names, str) else list(names)
        if unknown := [name for name in parts if name not in self.index]:
            raise ValueError(f"ArithmeticSymbols: {unknown[0]!r} is no symbol; expected such as '7', '+', 'sum' or 'k'")
        return torch.tensor([self.index[name] for name in parts], dtype=torch.long)

    def text(self, ids: Int[Tensor, " n"] | Sequence[int]) -> str:
        """The names of ids, separated by spaces."""
        return " ".join(self.names[int(token)] for token in ids)

    @cached_property
    def digits(self) -> Int[Tensor, " n"]:
        return self.ids([str(digit) for digit in range(10)])

    @cached_property
    def letters(self) -> Int[Tensor, " n"]:
        return self.ids(LETTERS)

    def operators(self, operator: str) -> Int[Tensor, " n"]:
        """The two tokens of an operator: as `infix` and as `prefix` write it."""
        return self.ids([operator, WORDS[operator]])


def arithmetic_episodes(
    batch: int,
    symbols: ArithmeticSymbols,
    *,
    ops: str = "+-",
    template: str = "infix",
    problems: int = 1,
    counterfactual: str = "operator",
    skew: float = 0.0,
    generator: torch.Generator | None = None,
) -> Episodes:
    """BOS and `problems` problems; the result of each is an answer. Results are modulo ten.

    ops: operators to draw from, `+-` (digits) or `<>` (letters), each problem on its own, so that what came before says
    nothing about the next. template: `infix` (`a + b = c .`), `prefix` (`sum a b is c .`) or `any`, drawn as well.
    counterfactual: the twin has another operator of the same kind in the last problem (`operator`), or one other
    operand (`operands`), and always another result; where the operator is changed, operands that would give the same
    result are not drawn.
    skew: in this share of the problems with digits one operand is small (0 to 3, each half as often as the one before),
    so that the other alone tells something of the result: that is where learning starts, pairs of evenly drawn digits
    say nothing of it one by one.
    Spans, of the last problem: `operator`, `first`, `second`, `equals` (the row that answers).
    Raises ValueError for operators of two kinds or of none, an unknown template or counterfactual, no problem.
    """
    kind = "+-" if set(ops) <= set("+-") else "<>"
    if not ops or not set(ops) <= set(kind):
        raise ValueError(f"arithmetic_episodes: ops is {ops!r}; expected operators of one kind, '+-' or '<>'")
    if template not in (*TEMPLATES, "any"):
        raise ValueError(f"arithmetic_episodes: template is {template!r}; expected infix, prefix or any")
    if counterfactual not in ("operator", "operands"):
        raise ValueError(f"arithmetic_episodes: counterfactual is {counterfactual!r}; expected operator or operands")
    if problems < 1:
        raise ValueError(f"arithmetic_episodes: problems is {problems}; expected at least 1")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (batch, *shape), generator=generator)

    pool = symbols.digits if kind == "+-" else symbols.letters
    size = len(pool)
    operator = torch.tensor([kind.index(name) for name in ops])[draw(len(ops), problems)]
    first, second = draw(size, problems), draw(size, problems)
    if kind == "<>":  # two different letters, so that the answer tells which was chosen
        second = (first + 1 + draw(size - 1, problems)) % size
    elif counterfactual == "operator":  # a + b and a - b differ unless 2 b is 0 modulo ten
        allowed = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9])
        second[:, -1] = allowed[draw(8)]
    if kind == "+-" and skew:
        weights = torch.tensor([8.0, 4.0, 2.0, 1.0])
        small = torch.multinomial(weights, batch * problems, replacement=True, generator=generator).view(batch, -1)
        fate = torch.rand(batch, problems, generator=generator)
        first = torch.where(fate < skew / 2, small, first)
        taken = (fate >= skew / 2) & (fate < skew)
        if counterfactual == "operator":
            taken &= small != 0
        second = torch.where(taken, small, second)
    prefix = {"infix": 0, "prefix": 1}
    form = draw(2, problems) if template == "any" else torch.full((batch, problems), prefix[template])
    other = {"operator": operator.clone(), "first": first.clone(), "second": second.clone()}
    if counterfactual == "operator":
        other["operator"][:, -1] = 1 - operator[:, -1]
    else:
        which = draw(2).bool() if kind == "+-" else operator[:, -1] == 1  # of letters, the one that is the answer
        step = 1 + draw(size - 1)
        if kind == "<>":  # never the letter beside it
            gap = torch.where(which, first[:, -1] - second[:, -1], second[:, -1] - first[:, -1]) % size
            step = 1 + draw(size - 2)
            step = step + (step >= gap)
        other["first"][:, -1] = torch.where(which, first[:, -1], (first[:, -1] + step) % size)
        other["second"][:, -1] = torch.where(which, (second[:, -1] + step) % size, second[:, -1])
    marks = torch.stack([symbols.operators(name) for name in kind])  # [operator, form]
    equals = symbols.ids("= is")

    def tell(operator: Tensor, first: Tensor, second: Tensor) -> Tensor:
        if kind == "+-":
            result = torch.where(operator == 0, first + second, first - second) % 10
        else:
            result = torch.where(operator == 0, first, second)
        sign, a, b = marks[operator, form], pool[first], pool[second]
        stop = symbols.ids(".").expand(batch, problems)
        told = [torch.where(form == 0, a, sign), torch.where(form == 0, sign, a), b, equals[form], pool[result], stop]
        return torch.stack(told, dim=2).flatten(1)[:, :-1]

    start = torch.full((batch,), 6 * (problems - 1))
    last = form[:, -1]
    spans = {
        "operator": at(start + 1 - last), "first": at(start + last), "second": at(start + 2), "equals": at(start + 3),
    }  # fmt: skip
    name = "arithmetic" if kind == "+-" else "letters"
    answers = [6 * problem + 4 for problem in range(problems)]
    return place(
        name,
        tell(operator, first, second),
        answers,
        text=None,
        length=None,
        generator=generator,
        spans=spans,
        twin=tell(**other),
    )


def answers_by_operator(episodes: Episodes, symbols: ArithmeticSymbols) -> dict[str, Bool[Tensor, "b t"]]:
    """Operator -> the answers of its problems, in both templates; operators without a problem are left out."""
    ids, found = episodes.input_ids, {}
    for operator in WORDS:
        infix, prefix = symbols.operators(operator)
        at_infix = torch.nn.functional.pad(ids == infix, (3, 0))[:, : ids.shape[1]]  # a + b = c: three back
        at_prefix = torch.nn.functional.pad(ids == prefix, (4, 0))[:, : ids.shape[1]]  # sum a b is c: four back
        mine = episodes.answers & (at_infix | at_prefix)
        if bool(mine.any()):
            found[operator] = mine
    return found
