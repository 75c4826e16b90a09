"""Adversarial training on attention scores (Attention AT, Attention iAT), and on word embeddings beside it.

    g = dL/da at the scores a of a sentence,   r = eps g / ||g||,   total = L(a) + lam L(a + r)

r is constant in the backward pass, and only training uses it. The direction comes from the clean pass itself by
`torch.autograd.grad`, which goes from the loss to the scores and no further: nothing is accumulated in `.grad`, and no
layer below the first perturbed attention is passed. So a step is two forwards and one full backward and a partial one;
where the network below attention is run once outside the function (`AttentionClassifier.encode`), it stays at one.

Paper: headwise/papers/attention_adversarial_training.py (Kitada and Iyatomi, 2021).
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from headwise.attend.edit import Heads, RowEdit, Rows
from headwise.attend.edits import PerturbScores

__all__ = ["AttentionAT", "WordAT", "score_spread"]

Mode = Literal["at", "iat", "random"] | str
Loss = Callable[[], Any]  # -> a scalar, or an output with `.loss`


def score_spread(scores: Float[Tensor, "*b s"]) -> Float[Tensor, "*b s"]:
    """Share of each position in the squared differences between the scores of a row: what makes AT into iAT.

    c_t = sum_k (a_t - a_k)^2 / sum_tk (a_t - a_k)^2; -inf marks hidden positions, which count for nothing and get 0.
    All zeros where a row has no differences.

    Attention iAT moves along the differences d_tk = a_t - a_k: r_t(alpha) = sum_k alpha_tk d_tk, whose gradient at
    alpha = 0 is s_t d_tk with s = dL/da; its direction is therefore s_t sum_k d_tk^2. With the whole matrix d
    normalised once that is s_t c_t up to a factor. With every row of d normalised to length 1, as the paper's formula
    reads, the sum is 1 and iAT is AT.
    """
    hidden = torch.isneginf(scores)
    known = scores.masked_fill(hidden, 0)
    number = (~hidden).sum(-1, keepdim=True).to(known.dtype)
    centred = (known - known.sum(-1, keepdim=True) / number.clamp_min(1)).masked_fill(hidden, 0)
    largest = centred.abs().amax(-1, keepdim=True) if centred.shape[-1] else centred
    centred = centred / largest.masked_fill(largest == 0, 1)  # so that squares neither overflow nor vanish
    squares = (number * centred.square() + centred.square().sum(-1, keepdim=True)).masked_fill(hidden, 0)
    return squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


class _AdversarialTraining:
    """The steps that both kinds share. A place is where a perturbation is added; its tensor starts with the batch."""

    def __init__(self, model: nn.Module, eps: float, lam: float, mode: Mode):
        name = type(self).__name__
        for argument, value in (("eps", eps), ("lam", lam)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {argument} is {value}; give a finite number, 0 or more")
        if mode not in ("at", "iat", "random"):
            raise ValueError(f"{name}: mode is {mode!r}; choose at, iat or random")
        self.model, self.eps, self.lam, self.mode = model, float(eps), float(lam), mode

    def __call__(self, loss: Loss) -> Tensor:
        """The total loss: L + lam L(perturbed). loss: runs the model on one batch, is called twice.

        Dropout draws the same masks in both passes. Without gradients (evaluation under `torch.no_grad`) it is the
        plain loss; a model in evaluation mode with gradients on is trained as any other.
        Raises ValueError where the loss has no gradient, or where nothing that could be perturbed has run.
        """
        if not torch.is_grad_enabled():
            return self._value(loss())
        before = _random_state(self.model)
        with self._attached() as places:
            clean = self._listen(loss, places)
            places.start(self._perturb(clean, places))
            with torch.random.fork_rng(devices=list(before[1])):
                _set_random_state(before)
                adversarial = self._value(loss())
        return clean + self.lam * adversarial

    def perturbation(self, loss: Loss) -> tuple[Tensor, dict[Hashable, Tensor]]:
        """The clean loss, and the perturbation of every place: `(tower, layer)` or the number of a point and a call."""
        with torch.enable_grad(), self._attached() as places:
            clean = self._listen(loss, places)
            return clean.detach(), self._perturb(clean, places)

    @contextlib.contextmanager
    def perturbed(self, perturbation: Mapping[Any, Tensor]) -> Iterator[None]:
        """Run the model with a perturbation, for instance as an attack at test time."""
        with self._attached() as places:
            places.start(dict(perturbation))
            yield

    def direction(self, gradients: dict[Hashable, Tensor], places: "_Places") -> dict[Hashable, Tensor]:
        """Where each place is moved, of any length: the gradient, re-weighted for iAT, or noise."""
        if self.mode == "random":
            return {
                key: torch.randn_like(gradient).masked_fill(~places.open[key], 0) for key, gradient in gradients.items()
            }
        return gradients if self.mode == "at" else self._iat(gradients, places)

    def _iat(self, gradients: dict[Hashable, Tensor], places: "_Places") -> dict[Hashable, Tensor]:
        raise NotImplementedError

    def _attached(self) -> contextlib.AbstractContextManager["_Places"]:
        raise NotImplementedError

    def _value(self, result: Any) -> Tensor:
        value = result if isinstance(result, Tensor) else getattr(result, "loss", None)
        if not isinstance(value, Tensor) or value.ndim:
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(result).__name__
            raise ValueError(
                f"{type(self).__name__}: the loss is {what}; return a scalar, or an output with one in .loss (give the "
                "model labels)"
            )
        return value

    def _listen(self, loss: Loss, places: "_Places") -> Tensor:
        clean = self._value(loss())
        if not places.leaves:
            raise ValueError(f"{type(self).__name__}: {self._missed}; call the model that was given inside the loss")
        if not clean.requires_grad:
            raise ValueError(f"{type(self).__name__}: the loss has no gradient; it must come from the model's output")
        return clean

    _missed = "nothing that is perturbed ran in the loss"

    def _perturb(self, clean: Tensor, places: "_Places") -> dict[Hashable, Tensor]:
        keys = list(places.leaves)
        leaves = [places.leaves[key] for key in keys]
        found = torch.autograd.grad(clean, leaves, retain_graph=True, allow_unused=True)
        gradients = {
            key: torch.zeros_like(leaf) if gradient is None else gradient.detach()
            for key, leaf, gradient in zip(keys, leaves, found, strict=True)
        }
        with torch.no_grad():
            return _scaled(self.direction(gradients, places), self.eps)


@dataclass
class _Places:
    """What is seen in the clean pass, and what is added in the next.

    leaves: zeros that ask for a gradient. open: where there is something to perturb. context: what iAT needs.
    """

    leaves: dict[Hashable, Tensor] = field(default_factory=dict)
    open: dict[Hashable, Tensor] = field(default_factory=dict)
    context: dict[Hashable, Any] = field(default_factory=dict)
    given: dict[Hashable, Tensor] | None = None
    calls: dict[int, int] = field(default_factory=dict)

    def start(self, given: dict[Hashable, Tensor]) -> None:
        """Add these from now on."""
        self.given = given
        self.calls.clear()

    def take(self, key: Hashable, like: Tensor, open_: Tensor, context: Any) -> Tensor:
        """What is added at a place: the leaf in the clean pass, the perturbation afterwards."""
        if self.given is not None:
            return self.given[key].to(like.device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.leaves[key] = torch.zeros(like.shape, dtype=dtype, device=like.device, requires_grad=True)
        self.open[key], self.context[key] = open_, context
        return self.leaves[key]

    def numbered(self, point: int) -> tuple[int, int]:
        """A point and how often it was passed before in this pass."""
        self.calls[point] = self.calls.get(point, -1) + 1
        return point, self.calls[point]


class AttentionAT(_AdversarialTraining):
    """Adversarial training on attention scores, for any model whose attention can be reached.

    model: a transformers model on the attention interface, or a module that holds points: submodules named
        `score_point` through which scores pass on their way to the softmax, -inf where masked, batch first
        (`AdditiveAttention` has one).
    eps: length of the perturbation of a sentence, over all its perturbed scores together (0 or more). lam: weight of
        the adversarial loss.
    mode: "at"; "iat", the gradient re-weighted by `score_spread`; "random", noise of the same length.
    heads: which heads of a transformers model ("*", "3.*", ...); None is every head of the main tower. A layer that a
        model uses at several depths has one perturbation for all of them.
    rows: "each" perturbs `[b, h, t, s]`; "shared" one `[b, h, 1, s]` for all rows of a head (not with "iat").

    Each perturbed layer forms its weights. Its dropout on weights is off in both passes: the perturbed scores are then
    those that the model uses; every other dropout is as it was, with one draw for both passes.
    Under transformers' Trainer, with or without accumulation and autocast:

        class AdversarialTrainer(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                kept = []
                def run():
                    kept.append(super(AdversarialTrainer, self).compute_loss(model, inputs, True, **kwargs))
                    return kept[-1][0]
                loss = self.adversarial(run)  # AttentionAT(self.model, eps=1.0)
                return (loss, kept[0][1]) if return_outputs else loss

    Raises ValueError for eps or lam below 0 or not finite, an unknown mode, "iat" with shared rows, heads named for a
    model of points, gradient checkpointing; UnsupportedModel for a model that has neither.

    Notes: the paper perturbs one row of scores. With many, the length is over all of them. The official code runs the
    encoder three times, and calls zero_grad and backward inside its forward. Its "iAT" is -AT: it takes differences
    between sentences, which never enter, and turns the sign. Here iAT is the paper's, with the differences normalised
    once per row of attention (see `score_spread`) and rescaled to length eps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float = 1.0,
        lam: float = 1.0,
        mode: Mode = "at",
        heads: Heads = None,
        rows: Literal["each", "shared"] | str = "each",
    ) -> None:
        super().__init__(model, eps, lam, mode)
        if rows not in ("each", "shared"):
            raise ValueError(f"AttentionAT: rows is {rows!r}; choose each or shared")
        if rows == "shared" and mode == "iat":
            raise ValueError("AttentionAT: mode 'iat' is about the differences within one row; use rows='each'")
        self.rows, self.heads = rows, heads
        self.points = [point for module in model.modules() if (point := getattr(module, "score_point", None))]
        if self.points and heads is not None:
            raise ValueError(
                f"AttentionAT: heads is {heads!r}, but this model's attention is reached by its {len(self.points)} "
                "score points; leave heads out"
            )
        if not self.points:
            self._refuse()

    _missed = "no attention of the chosen heads ran in the loss"

    def _refuse(self) -> None:
        """Raise where the model's attention cannot be perturbed."""
        from headwise.attend.addresses import select_heads
        from headwise.hf.addresses import attention_modules, layout, unwrap

        places = attention_modules(self.model)
        if not isinstance(self.heads, str | None):
            self.heads = list(self.heads)
        self._named = {(head.tower, head.layer) for head in select_heads(self.heads, layout(self.model))}
        self._modules = [module for module, place in places.items() if place in self._named]
        if unwrap(self.model).is_activation_checkpointing:
            raise ValueError(
                "AttentionAT: gradient checkpointing runs layers again in the backward pass, when the perturbation is "
                "gone; turn it off (model.activation_checkpointing_disable())"
            )

    @contextlib.contextmanager
    def _attached(self) -> Iterator[_Places]:
        places = _Places()
        with contextlib.ExitStack() as stack:
            if self.points:
                for number, point in enumerate(self.points):
                    stack.callback(point.register_forward_hook(self._at_point(number, places)).remove)
            else:
                from headwise.hf.session import steer

                self._refuse()
                edit = _Scores(heads=self.heads, places=places, shared=self.rows == "shared", spread=self.mode == "iat")
                stack.enter_context(steer(self.model, edit))
                stack.enter_context(_without_dropout(self._modules))
            yield places

    def _at_point(self, number: int, places: _Places) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, scores: Tensor) -> Tensor:
            wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
            spread = score_spread(wide) if self.mode == "iat" else None
            return scores + places.take(places.numbered(number), scores, ~torch.isneginf(scores), spread)

        return hook

    def _iat(self, gradients: dict[Hashable, Tensor], places: _Places) -> dict[Hashable, Tensor]:
        return {key: gradient * places.context[key] for key, gradient in gradients.items()}


@dataclass
class _Scores(RowEdit):
    """`PerturbScores` whose delta is made at the first call of each layer, when its shape is known."""

    places: _Places = field(default_factory=_Places, kw_only=True)
    shared: bool = field(default=False, kw_only=True)
    spread: bool = field(default=False, kw_only=True)

    def change(self, weights: Tensor, rows: Rows) -> Tensor:
        call, places = rows.call, self.places
        key = (call.tower, call.layer)
        if places.given is None:
            named = rows.named or call.heads
            shape = (call.q.shape[0], len(named), 1 if self.shared else call.q.shape[2], call.k.shape[2])
            leaf = places.leaves.get(key)
            if leaf is None:
                blank = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
                places.take(key, blank, torch.zeros_like(blank, dtype=torch.bool), torch.zeros_like(blank))
            elif leaf.shape != shape:
                raise ValueError(
                    f"AttentionAT: layer {call.layer} was called on {tuple(leaf.shape)} and {shape} scores in one "
                    "forward; name heads of layers that are called once, or pad all calls to one shape"
                )
            with torch.no_grad():
                self._note(key, rows, [named.index(head) for head in call.heads])
        delta: dict[Any, Tensor] = places.leaves if places.given is None else places.given
        return PerturbScores(delta={key: delta[key]}).change(weights, rows)

    def _note(self, key: Hashable, rows: Rows, heads: list[int]) -> None:
        """Where these rows have something to perturb, and for iAT the spread of their scores."""
        call, whole = rows.call, self.places.open[key]
        real = call.real_rows[:, rows.index]
        shown = (rows.visible & real[:, None, :, None]).expand(real.shape[0], len(heads), -1, -1)
        places = torch.arange(call.q.shape[2], device=real.device)[rows.index]
        for position, head in enumerate(heads):
            if self.shared:
                whole[:, head] |= shown[:, position].any(1, keepdim=True)
            else:
                whole[:, head, places] = shown[:, position]
        if self.spread:
            scores = call.scores(rows.index).masked_fill(~rows.visible, -torch.inf)
            spread = score_spread(scores).to(self.places.context[key])
            for position, head in enumerate(heads):
                self.places.context[key][:, head, places] = spread[:, position]


class WordAT(_AdversarialTraining):
    """Adversarial training on word embeddings, the older method that Attention AT is compared with.

    model: anything with `get_input_embeddings()`, or an embedding itself. eps, lam: as for `AttentionAT`; the length is
    over all words of a sentence.
    mode: "at" (Miyato et al., 2017); "iat" moves words along the directions to the words of the vocabulary (Sato et
    al., 2018): r_t = sum_k alpha_tk d_tk with d_tk = (w_k - w_t) / ||w_k - w_t||, alpha along its gradient; "random".

    Notes: embeddings are not normalised by word frequency, as the first of these papers does. iAT is rescaled to length
    eps, so that one eps means one thing.
    Raises ValueError for eps or lam below 0 or not finite, and an unknown mode; TypeError without an embedding.
    """

    def __init__(self, model: nn.Module, *, eps: float = 1.0, lam: float = 1.0, mode: Mode = "at") -> None:
        super().__init__(model, eps, lam, mode)
        find = getattr(model, "get_input_embeddings", lambda: model)
        self.embedding: Any = find()
        if not isinstance(getattr(self.embedding, "weight", None), Tensor):
            raise TypeError(
                f"WordAT: {type(model).__name__} has no input embedding with a weight; give a model with "
                "get_input_embeddings(), or the embedding"
            )

    _missed = "the embedding did not run in the loss"

    @contextlib.contextmanager
    def _attached(self) -> Iterator[_Places]:
        places = _Places()

        def hook(module: nn.Module, args: tuple[Any, ...], words: Tensor) -> Tensor:
            padding = getattr(module, "padding_idx", None)
            ids = args[0]
            real = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
            return words + places.take(places.numbered(0), words, real[..., None], words.detach()).to(words.dtype)

        handle = self.embedding.register_forward_hook(hook)
        try:
            yield places
        finally:
            handle.remove()

    def _iat(self, gradients: dict[Hashable, Tensor], places: _Places) -> dict[Hashable, Tensor]:
        table = self.embedding.weight.detach()
        return {key: _toward_words(one, places.context[key], table) for key, one in gradients.items()}


def _toward_words(
    gradient: Float[Tensor, "b t d"], words: Float[Tensor, "b t d"], table: Float[Tensor, "v d"]
) -> Float[Tensor, "b t d"]:
    """sum_k (g . d_k) d_k over the unit vectors d_k from each word to the others, without forming them."""
    table = table.to(gradient)
    flat, own = gradient.flatten(0, 1), words.to(gradient).flatten(0, 1)
    block = max(1, (1 << 23) // max(1, len(table)))
    moved = []
    for g, w in zip(flat.split(block), own.split(block), strict=True):
        distance = torch.cdist(w, table)
        inverse = torch.where(distance > 1e-6 * (1 + w.norm(dim=-1, keepdim=True)), 1 / distance, 0)
        share = (g @ table.mT - (g * w).sum(-1, keepdim=True)) * inverse * inverse
        moved.append(share @ table - share.sum(-1, keepdim=True) * w)
    return torch.cat(moved).view_as(gradient) if moved else gradient


def _scaled(directions: dict[Hashable, Tensor], eps: float) -> dict[Hashable, Tensor]:
    """The directions at length eps for each item of the batch, over all places together; 0 where there is none."""
    sizes = {len(one) for one in directions.values()}
    if len(sizes) != 1:
        raise ValueError(f"the perturbed places have batches of {sorted(sizes)}; one loss must be about one batch")
    home = next(iter(directions.values())).device
    if 0 in sizes:
        return directions

    def per_item(reduce: Callable[[Tensor], Tensor]) -> Shaped[Tensor, "n b"]:
        return torch.stack([reduce(one.flatten(1)).to(home) for one in directions.values() if one[0].numel()])

    largest = per_item(lambda x: x.abs().amax(1)).amax(0)  # squares of a tiny gradient would vanish
    safe = largest.masked_fill(largest == 0, 1)

    def shaped(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like).view(-1, *[1] * (like.ndim - 1))

    unit = {key: one / shaped(safe, one) for key, one in directions.items()}
    square = torch.stack([one.flatten(1).square().sum(1).to(home) for one in unit.values()]).sum(0)
    length = square.sqrt().masked_fill(largest == 0, 1)
    return {key: eps * one / shaped(length, one) for key, one in unit.items()}


@contextlib.contextmanager
def _without_dropout(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules' own training flags off; what they contain stays as it is."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _random_state(model: nn.Module) -> tuple[Tensor, dict[int, Tensor]]:
    """State of the generators that dropout draws from."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in sorted(devices)}


def _set_random_state(state: tuple[Tensor, dict[int, Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for index, one in state[1].items():
        torch.cuda.set_rng_state(one, index)
