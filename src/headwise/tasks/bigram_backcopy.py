"""Bigram-Backcopy: a Markov text in which some tokens make the next one a copy of the one before; it grows sinks.

Paper: headwise/papers/active_dormant_heads.py (Guo et al., 2024).
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["BigramBackcopy"]


class BigramBackcopy:
    """Sequences BOS, x_1, x_2, ... where x_{t+1} = x_{t-1} if x_t is a trigger and x_{t+1} ~ P[x_t] otherwise.

    BOS is token 0, the symbols are 1 to `vocab_size`; nothing emits BOS. x_1 comes from the unigrams with the triggers
    removed, so that BOS is never copied.

    vocab_size: symbols without BOS; None means 64, or what `transition` brings. triggers: how many of the most frequent
    symbols are triggers, or their ids. length: tokens of a sequence, BOS included. transition: None draws rows from
    Dirichlet(0.1) by `seed`; a matrix [v v] gives the rows (its unigrams are the stationary distribution); a text gives
    both by counting its characters (`symbols` then names them).
    Raises ValueError for more triggers than symbols leave, a trigger that is BOS, rows that are no distributions, a
    length below 3.
    """

    bos = 0

    def __init__(
        self,
        vocab_size: int | None = None,
        triggers: int | Sequence[int] = 3,
        length: int = 256,
        transition: Tensor | str | None = None,
        seed: int = 0,
    ) -> None:
        where = "BigramBackcopy"
        if length < 3:
            raise ValueError(f"{where}: length is {length}; a copy needs BOS and two tokens, so at least 3")
        self.symbols: list[str] | None = None
        if isinstance(transition, str):
            self.symbols, matrix, unigram = _count(transition)
        elif transition is None:
            matrix, unigram = _dirichlet(64 if vocab_size is None else vocab_size, seed), None
        else:
            matrix, unigram = torch.as_tensor(transition, dtype=torch.float64), None
        _check_rows(matrix)
        if vocab_size not in (None, len(matrix)):
            raise ValueError(
                f"{where}: vocab_size is {vocab_size} but transition has {len(matrix)} symbols; leave one out"
            )
        self.vocab_size, self.length, self.seed = len(matrix), length, seed
        unigram = _stationary(matrix) if unigram is None else unigram
        if isinstance(triggers, int):
            if not 0 <= triggers < self.vocab_size:
                raise ValueError(f"{where}: triggers is {triggers}; expected 0 to {self.vocab_size - 1} of the symbols")
            chosen = (unigram.argsort(descending=True, stable=True)[:triggers] + 1).tolist()
        else:
            chosen = list(triggers)
            if self.bos in chosen:
                raise ValueError(f"{where}: trigger {self.bos} is BOS, which is never copied; symbols are 1 and up")
            if (
                len(set(chosen)) != len(chosen)
                or len(chosen) >= self.vocab_size
                or not all(1 <= token <= self.vocab_size for token in chosen)
            ):
                raise ValueError(
                    f"{where}: triggers are {chosen}; expected different ids of 1 to {self.vocab_size}, not all"
                )
        self.triggers: tuple[int, ...] = tuple(chosen)
        # Row and column 0 are BOS: its row holds the distribution of the first symbol.
        self.transition: Float[Tensor, "n n"] = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.float64)
        self.transition[1:, 1:] = matrix
        first = unigram.clone()
        first[[token - 1 for token in chosen]] = 0.0
        if first.sum() <= 0:
            raise ValueError(f"{where}: only triggers ever occur, so no first symbol is left; choose fewer triggers")
        self.transition[0, 1:] = first / first.sum()
        self._is_trigger = torch.zeros(self.num_tokens, dtype=torch.bool)
        self._is_trigger[list(chosen)] = True

    @property
    def num_tokens(self) -> int:
        """Symbols and BOS: the vocabulary of a model of this task."""
        return self.vocab_size + 1

    def sample(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        length: int | None = None,
        avoid: Int[Tensor, "b n"] | None = None,
    ) -> Int[Tensor, "b t"]:
        """`batch` sequences, one draw per position for all of them.

        avoid: symbols that a sequence must not hold; they leave the transitions, whose rest is renormalised (used to
        hide a needle in text that holds none of its words).
        """
        length = self.length if length is None else length
        table = self.transition
        if avoid is not None:
            table = self.transition.expand(batch, -1, -1).clone()
            table.scatter_(2, avoid[:, None].expand(-1, self.num_tokens, -1), 0.0)
            total = table.sum(-1, keepdim=True)
            rest = table[:, :1] / total[:, :1].clamp(min=1e-300)  # a row whose every successor is avoided starts afresh
            table = torch.where(total > 0, table / total.clamp(min=1e-300), rest)
        cumulative = table.cumsum(-1)
        cumulative = cumulative / cumulative[..., -1:]
        draws = torch.rand(length, batch, 1, dtype=torch.float64, generator=generator)
        ids = torch.full((batch, length), self.bos)
        each = torch.arange(batch)
        for t in range(1, length):
            now = ids[:, t - 1]
            rows = cumulative[now] if avoid is None else cumulative[each, now]
            after = torch.searchsorted(rows, draws[t], right=True).clamp(max=self.num_tokens - 1)[:, 0]
            ids[:, t] = torch.where(self._is_trigger[now], ids[:, t - 2], after) if t > 1 else after
        return ids

    def trigger_mask(self, input_ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """True at the rows whose token is a trigger: their output is a copy of the token before."""
        return self._is_trigger.to(input_ids.device)[input_ids]

    def oracle_logprobs(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """The true log-probabilities of the next token at every row (float64, minus infinity where it cannot come)."""
        table = self.transition.to(input_ids.device)
        truth = table[input_ids]
        before = torch.cat([input_ids[:, :1], input_ids[:, :-1]], dim=1)
        copy = torch.nn.functional.one_hot(before, self.num_tokens).to(truth.dtype)
        return torch.where(self.trigger_mask(input_ids)[..., None], copy, truth).log()

    def bayes_loss(self, input_ids: Int[Tensor, "b t"]) -> dict[str, float]:
        """Loss in nats of the true distribution on these sequences, rows 1 and up: `trigger` (0), `other`, `all`."""
        chosen = self.oracle_logprobs(input_ids)[:, 1:-1].gather(-1, input_ids[:, 2:, None])[..., 0]
        return self._split(-chosen, input_ids)

    def losses(self, logits: Float[Tensor, "b t v"], input_ids: Int[Tensor, "b t"]) -> dict[str, float]:
        """What a model pays, against the true conditional distribution and not the drawn tokens.

        `trigger` and `other` are cross-entropies in nats, `excess` is `other` minus the entropy of the truth (>= 0),
        `accuracy` the share of trigger rows whose most likely token is the copy. Row 0 (BOS) is left out.
        """
        truth = self.oracle_logprobs(input_ids)[:, 1:-1]
        chance = truth.exp()
        predicted = logits[:, 1:-1, : self.num_tokens].double().log_softmax(-1)
        entropy = -(chance * truth.clamp(min=-1e9)).sum(-1)
        cross = -(chance * predicted).sum(-1)
        split = self._split(cross, input_ids)
        rows = self.trigger_mask(input_ids)[:, 1:-1]
        right = (predicted.argmax(-1) == input_ids[:, :-2])[rows]
        return {
            "trigger": split["trigger"],
            "other": split["other"],
            "excess": float((cross - entropy)[~rows].mean()),
            "accuracy": float(right.double().mean()) if len(right) else math.nan,
        }

    def _split(self, values: Float[Tensor, "b r"], input_ids: Int[Tensor, "b t"]) -> dict[str, float]:
        rows = self.trigger_mask(input_ids)[:, 1:-1]
        parts = {"trigger": values[rows], "other": values[~rows], "all": values.flatten()}
        return {name: float(part.mean()) if len(part) else math.nan for name, part in parts.items()}


def _count(text: str) -> tuple[list[str], Float[Tensor, "v v"], Float[Tensor, " v"]]:
    if len(set(text)) < 2:
        raise ValueError("BigramBackcopy: the text has fewer than two different characters; give a longer text")
    symbols = sorted(set(text))
    index = {symbol: i for i, symbol in enumerate(symbols)}
    matrix = torch.zeros(len(symbols), len(symbols), dtype=torch.float64)
    for (a, b), times in Counter(pairwise(text)).items():
        matrix[index[a], index[b]] = times
    unigram = torch.tensor([text.count(symbol) for symbol in symbols], dtype=torch.float64)
    unigram /= unigram.sum()
    total = matrix.sum(-1, keepdim=True)  # a character that only ends the text has no successor: use the unigrams
    return symbols, torch.where(total > 0, matrix / total.clamp(min=1), unigram), unigram


def _dirichlet(size: int, seed: int) -> Float[Tensor, "v v"]:
    if size < 2:
        raise ValueError(f"BigramBackcopy: vocab_size is {size}; expected at least 2 symbols")
    generator = torch.Generator().manual_seed(seed)
    # torch's gamma sampler takes a generator only through this private name; a weak concentration of 0.1 can give a
    # row of zeros in float32, so it runs in float64.
    weights = torch._standard_gamma(torch.full((size, size), 0.1, dtype=torch.float64), generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    return weights / weights.sum(-1, keepdim=True)


def _check_rows(matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"BigramBackcopy: transition has shape {tuple(matrix.shape)}; expected a square matrix [v v]")
    if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
        raise ValueError(
            "BigramBackcopy: transition has entries that are negative or not finite; rows are probabilities"
        )
    off = (matrix.sum(-1) - 1).abs()
    if float(off.max()) > 1e-4:
        row = int(off.argmax())
        raise ValueError(f"BigramBackcopy: row {row} of transition sums to {float(matrix[row].sum()):.4g}; expected 1")


def _stationary(matrix: Float[Tensor, "v v"]) -> Float[Tensor, " v"]:
    """The chain's long-run shares; the lazy chain is iterated, so that a periodic one settles too."""
    share = torch.full((len(matrix),), 1 / len(matrix), dtype=matrix.dtype)
    for _ in range(1000):
        share = 0.5 * share + 0.5 * share @ matrix
    return share / share.sum()
