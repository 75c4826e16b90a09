"""ZeroTuning: scale the attention of every query to the first token, head by head, and renormalise.

    a_0' = gamma a_0 / D,  a_i' = a_i / D,  D = 1 + (gamma - 1) a_0

which is the same as adding log gamma to the score of key 0. gamma > 1 flattens what is left, gamma < 1 sharpens it;
because the first token is a sink the lever is long.

Paper: headwise/papers/zero_tuning.py (Han et al., 2025).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edit import Edit, Heads
from headwise.attend.edits import BiasGroup, PerturbScores
from headwise.attend.groups import first_token
from headwise.heads.decoding import greedy_answers
from headwise.hf.addresses import layout
from headwise.hf.session import steer
from headwise.steering.search import HeadSearch, search_heads
from headwise.tasks.prompted import Answers, read_label

__all__ = [
    "ZeroTuning",
    "initial_token_bias",
    "scale_initial_token",
    "sweep_initial_token",
    "token_leverage",
    "tune_initial_token",
]

Gamma = float | Tensor | Mapping[Head, float]
GAMMAS = (0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 4.0)


@dataclass
class ZeroTuning(Edit):
    """Multiply the weight of the first token by gamma and renormalise.

    gamma: 0 or more; a number for all named heads, `[l, h]`, or a number for each head. At 1 nothing changes. A row
    that sees only the first token stays as it is. The first token is the first real one of each sequence: with padding
    on the left it is not column 0, and without a BOS token it is simply the first word.

    Notes: the authors' code takes a head number and edits that number in every layer, which is the selection "*.3"
    here; the paper's variant for fused kernels scales the key, which is another edit (it multiplies the score) and is
    not offered.

    >>> ZeroTuning(gamma=1.0).neutral
    True
    """

    gamma: Gamma = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("ZeroTuning", self.gamma)
        if isinstance(self.gamma, Mapping) and self.heads is None:
            self.heads = list(self.gamma)

    @property
    def neutral(self) -> bool:
        gamma = self.gamma
        if isinstance(gamma, Tensor):  # one that is being learned is at work also where it is 1
            return not gamma.requires_grad and bool((gamma == 1).all())
        return all(value == 1 for value in gamma.values()) if isinstance(gamma, Mapping) else gamma == 1

    def primitives(self) -> tuple[Edit, ...]:
        bias = 0.0 if self.neutral else initial_token_bias(self.gamma)
        return (BiasGroup(first_token(), bias, heads=self.heads, when=self.when),)


def initial_token_bias(gamma: Gamma) -> float | Tensor | dict[Head, float]:
    """What is added to the score of the first token: log gamma, -inf at 0.

    >>> initial_token_bias(1.0)
    0.0
    """
    _check("initial_token_bias", gamma)
    if isinstance(gamma, Tensor):
        return gamma.log()
    if isinstance(gamma, Mapping):
        return {head: _log(value) for head, value in gamma.items()}
    return _log(gamma)


def scale_initial_token(
    weights: Float[Tensor, "... s"], gamma: float | Tensor, index: int | Int[Tensor, "..."] = 0
) -> Float[Tensor, "... s"]:
    """The edit on weights that were formed: `a_index` times gamma, rows renormalised.

    gamma, index: one for all rows, or a tensor that broadcasts over the leading axes (`[h, 1]` for each head of
    `[b, h, t, s]`, an index of `[b, 1, 1]` for padding on the left). Rows of which nothing would be left stay as they
    are: those with all weight on the first token at gamma 0, those with none on it at infinity, and rows of zeros.

    >>> scale_initial_token(torch.tensor([0.6, 0.3, 0.1]), 2.0).tolist()
    [0.75, 0.1875, 0.0625]
    """
    _check("scale_initial_token", gamma)
    s = weights.shape[-1]
    if not isinstance(index, Tensor) and not 0 <= index < s:
        raise ValueError(f"scale_initial_token: index is {index}; the rows have {s} keys, so 0 to {s - 1}")
    work = weights.to(torch.promote_types(weights.dtype, torch.float32))
    factor = torch.as_tensor(gamma, dtype=work.dtype, device=work.device)[..., None]
    first = torch.nn.functional.one_hot(torch.as_tensor(index, device=work.device).long(), s).bool()
    # gamma a_0 and a_i, both divided by gamma where it is above 1, so that infinity means "nothing else".
    scaled = torch.where(first, work * factor.clamp_max(1), work * factor.reciprocal().clamp_max(1))
    total = scaled.sum(-1, keepdim=True)
    tiny = torch.finfo(work.dtype).tiny
    return torch.where((total > 0) & (factor != 1), scaled / total.clamp_min(tiny), work).to(weights.dtype)


def token_leverage(
    model: nn.Module, inputs: Mapping[str, Any], loss: Callable[[Any], Float[Tensor, " b"]]
) -> Float[Tensor, "b n s"]:
    """How far scaling a token's attention moves the loss: d loss / d log gamma at gamma 1, of every token for itself.

    One forward and one backward for all n heads of the main tower (in the order of `layout(model).heads()`) and all s
    tokens. Column 0 is the lever of ZeroTuning where nothing is padded. loss: from the model's output to one number a
    text.
    """
    main = layout(model).main
    ids = inputs["input_ids"]
    bias = {
        (main.name, layer): torch.zeros(len(ids), count, 1, ids.shape[1], device=ids.device, requires_grad=True)
        for layer, count in enumerate(main.heads)
        if count
    }
    # A delta of one row is the same for every query: its gradient sums over them.
    with torch.enable_grad(), steer(model, PerturbScores(dict(bias))):
        found = torch.autograd.grad(loss(model(**inputs)).sum(), list(bias.values()))
    return torch.cat(found, 1)[:, :, 0]


def tune_initial_token(
    model: nn.Module,
    score: Callable[[], Tensor],
    held_out: Callable[[], Tensor],
    *,
    gammas: Sequence[float] = GAMMAS,
    probe: float = 1.5,
    heads: Heads = None,
    draws: int = 20,
    seed: int = 0,
) -> HeadSearch:
    """Choose heads and one gamma for them, as the paper does, and measure the choice on prompts it has not seen.

    Every head is tried alone: it is up-effective if gamma `probe` raises the mean score, down-effective if `1 / probe`
    does. One kind is tuned with one gamma of the grid; so are, as controls, all heads and random sets.

    score, held_out: run the model and return one number a prompt, larger is better: accuracy or log-likelihood of the
    right answer (supervised), or minus the entropy of the next token on prompts without labels (the paper's
    unsupervised form). score runs on the calibration prompts, held_out on others.

    Notes: the paper tunes the kind with more heads; here it is the kind that gains more on the calibration prompts.
    """
    _check_grid("tune_initial_token", gammas)
    if not 1 < probe < math.inf:
        raise ValueError(f"tune_initial_token: probe is {probe}; it must be above 1 (its inverse is tried as well)")
    return search_heads(
        model,
        lambda chosen, gamma: ZeroTuning(gamma=gamma, heads=chosen),
        score,
        held_out,
        candidates=heads,
        strengths=gammas,
        probes=(probe, 1 / probe),
        draws=draws,
        seed=seed,
    )


def sweep_initial_token(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[str],
    truth: Sequence[int],
    *,
    gammas: Sequence[float] = GAMMAS,
    heads: Heads = None,
    max_new_tokens: int = 8,
) -> dict[float, Answers]:
    """What a model answers at every gamma: accuracy, share of answers that name a label, accuracy among those.

    prompts: as the model is to read them, chat template included where it has one; BOS is added by the tokenizer.
    labels: the words of an answer; truth: the number of the right one for each prompt. Answers are decoded greedily.

    Notes: a gamma that is best on these prompts says nothing about others; choose it on a calibration split.
    """
    _check_grid("sweep_initial_token", gammas)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    bos = getattr(tokenizer, "bos_token_id", None)
    bare = sum(bos is not None and bool(row) and row[0] != bos for row in ids)
    if bare:
        warnings.warn(
            f"sweep_initial_token: {bare} of {len(ids)} prompts do not begin with {tokenizer.bos_token!r}, so gamma "
            "scales their first word and no sink; leave the special tokens to the tokenizer",
            stacklevel=2,
        )
    found = {}
    for gamma in gammas:
        with steer(model, ZeroTuning(gamma=gamma, heads=heads)):
            said = greedy_answers(model, ids, max_new_tokens=max_new_tokens)
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in said]
        found[gamma] = Answers([read_label(text, labels) for text in texts], truth)
    return found


def _log(gamma: float) -> float:
    return math.log(gamma) if gamma > 0 else -math.inf


def _check(where: str, gamma: Gamma) -> None:
    if isinstance(gamma, Tensor):
        values = [float(gamma.detach().min())]
    else:
        values = list(gamma.values()) if isinstance(gamma, Mapping) else [gamma]
    if not all(value >= 0 for value in values):  # nan is not, either
        shown = f"a tensor with {values[0]}" if isinstance(gamma, Tensor) else gamma
        raise ValueError(f"{where}: gamma is {shown}; it must be 0 or more (1 changes nothing)")


def _check_grid(where: str, gammas: Sequence[float]) -> None:
    if not len(gammas) or not all(0 <= gamma < math.inf for gamma in gammas):
        raise ValueError(f"{where}: gammas are {list(gammas)}; give at least one, all 0 or more and finite")
