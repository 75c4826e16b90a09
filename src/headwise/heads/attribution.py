"""Which head and which MLP wrote an answer's logit: an exact split, and the logits that each depth already holds.

With the final norm's scale s frozen, logits are linear in the stream, and the stream is a sum of writes:

    logit_w = (gain * centre(embedding + sum of writes)) / s . unembedding_w + bias_w

Norms are told from how they act (centred or not, gain, bias), and the sum is compared with the model's own logits: a
model for which it does not come out is refused by name. Cost: one forward and one product a layer, with no more than
the asked tokens' columns of the unembedding.

Papers: headwise/papers/multiple_choice_circuit.py, headwise/papers/circuit_component_reuse.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import UnsupportedModel
from headwise.heads._patch_runs import Inputs, check_decoder, tokens
from headwise.heads.decoding import arguments, embedding_device
from headwise.hf.addresses import layout, unwrap
from headwise.hf.inputs import takes, vocabulary_size
from headwise.hf.projections import head_writes
from headwise.hf.sites import Sites, find_sites, record

__all__ = ["LogitAttribution", "logit_attribution", "logit_lens"]


@dataclass(frozen=True)
class LogitAttribution:
    """Parts of the logits of n tokens: heads, MLPs, and the rest (embedding, biases, mixers without heads).

    heads: nan where a layer has fewer heads. logits: what the parts add up to, before any softcap.
    """

    heads: Float[Tensor, "b l h n"]
    mlps: Float[Tensor, "b l n"]
    rest: Float[Tensor, "b n"]
    logits: Float[Tensor, "b n"]


def logit_attribution(
    model: nn.Module, inputs: Inputs, tokens: Int[Tensor, "b n"] | Int[Tensor, " n"], *, position: int = -1
) -> LogitAttribution:
    """Split the logits of tokens at a position into what every head and MLP wrote.

    inputs: token ids, or a tokenizer's output padded on the left. tokens: ids whose logits are split, n for each prompt
    or the same n for all. The parts add up to the logits; a softcap (Gemma 2) comes after them. The scale of the final
    norm, and of a norm behind attention where a family has one, is that of this run.

    >>> parts = logit_attribution(model, ids, answers[:, None])  # doctest: +SKIP
    >>> parts.heads.nansum((1, 2)) + parts.mlps.sum(1) + parts.rest  # the logits  # doctest: +SKIP

    Raises ValueError for tokens or a position out of range; UnsupportedModel, naming the class, where the parts do not
    add up to the model's own logits.
    """
    where = "logit_attribution"
    run = _Run.of(where, model, inputs, position)
    ids = _asked(where, tokens, run.final.shape[0], vocabulary_size(model)).to(run.final.device)
    tail = Tail.of(model, run.sites, run.final, run.logits)
    directions, biases = tail.directions(ids)
    main = layout(model).main
    b, n = ids.shape
    heads = torch.full((b, main.layers, max(main.heads), n), torch.nan, dtype=directions.dtype, device=ids.device)
    mlps = torch.zeros(b, main.layers, n, dtype=directions.dtype, device=ids.device)
    rest = biases + torch.einsum("bc,bnc->bn", run.of_site("residual:0"), directions)
    for layer, parts in enumerate(run.sites.layers):
        for site in run.sites.writes(layer):
            write = torch.einsum("bc,bnc->bn", run.of_site(str(site)), directions)
            if site.kind == "mlp":
                mlps[:, layer] = write
                continue
            rest = rest + write
            if site.kind != "attention" or parts.projection is None:
                continue
            before = run.of_site(f"projection:{layer}")
            inside = _through(model, parts, before, run.of_site(str(site)), directions, layer)
            z = run.of_site(f"heads:{layer}")
            each = head_writes(parts.projection, z.shape[1]).to(directions.dtype)
            share = torch.einsum("bhe,hec,bnc->bhn", z, each, inside)
            heads[:, layer, : z.shape[1]] = share
            rest = rest - share.sum(1)
    logits = torch.einsum("bc,bnc->bn", run.final.to(directions.dtype), directions) + biases
    return LogitAttribution(heads, mlps, rest, logits)


def logit_lens(
    model: nn.Module, inputs: Inputs, tokens: Int[Tensor, "b n"] | Int[Tensor, " n"], *, position: int = -1
) -> Float[Tensor, "b l n"]:
    """Logits of tokens as the final norm and the unembedding would read the stream before every layer, and at the end.

    Of l + 1 depths the first is the embedding's, the last the model's own logits before any softcap. Arguments and
    errors as in `logit_attribution`.
    """
    where = "logit_lens"
    run = _Run.of(where, model, inputs, position)
    ids = _asked(where, tokens, run.final.shape[0], vocabulary_size(model)).to(run.final.device)
    tail = Tail.of(model, run.sites, run.final, run.logits)
    streams = [run.seen[f"residual:{layer}"][:, run.column] for layer in range(len(run.sites.layers))]
    with torch.no_grad():
        return torch.stack([tail.raw(stream).gather(-1, ids) for stream in [*streams, run.final]], 1)


class Tail:
    """From the final stream to the logits: norm, unembedding, a factor and, after these, perhaps a softcap."""

    def __init__(self, model: nn.Module, sites: Sites, final: Tensor, factor: float, cap: float | None) -> None:
        self.norm, self.unembedding = sites.final_norm, sites.unembedding
        self.factor, self.cap, self.final = factor, cap, final
        self.frozen = FrozenNorm(self.norm, final)

    @classmethod
    def of(cls, model: nn.Module, sites: Sites, final: Float[Tensor, "b c"], logits: Float[Tensor, "b v"]) -> "Tail":
        """Told from one run and proved on it. Raises UnsupportedModel where the logits come about in another way."""
        name = type(unwrap(model)).__name__
        weight = getattr(sites.unembedding, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != final.shape[-1]:
            raise UnsupportedModel(f"{name}: its unembedding is no plain matrix from the stream to the vocabulary")
        cap = getattr(unwrap(model).config.get_text_config(), "final_logit_softcapping", None)
        with torch.no_grad():
            plain = cls(model, sites, final, 1.0, None).raw(final).double()
        said = logits.double()
        if cap is not None:
            said = float(cap) * torch.atanh((said / float(cap)).clamp(-1 + 1e-12, 1 - 1e-12))
        keep = torch.ones_like(said, dtype=torch.bool)
        if cap is not None:  # near the cap the inverse has no digits left
            keep = (logits.double() / float(cap)).abs() < 0.99
        keep &= said.isfinite()
        factor = float((said[keep] * plain[keep]).sum() / plain[keep].square().sum().clamp_min(1e-30))
        factor = 1.0 if abs(factor - 1) < 1e-3 else factor
        error = float((said[keep] - factor * plain[keep]).norm() / said[keep].norm().clamp_min(1e-30))
        if not error <= slack(final.dtype):
            raise UnsupportedModel(
                f"{name}: final norm and unembedding give other logits than the model (relative error {error:.1e}); "
                "it does something else to them, and attribution would not add up"
            )
        return cls(model, sites, final, factor, None if cap is None else float(cap))

    def raw(self, stream: Float[Tensor, "... c"]) -> Float[Tensor, "... v"]:
        """Logits before any softcap."""
        stream = stream.to(self.final.dtype)
        normed = stream if self.norm is None else self.norm.forward(stream[:, None])[:, 0]
        assert self.unembedding is not None
        return self.unembedding(normed) * self.factor

    def linear(self, stream: Float[Tensor, "n b c"]) -> Float[Tensor, "n b v"]:
        """Logits of other streams under the frozen scale, softcap included."""
        assert self.unembedding is not None
        logits = self.unembedding(self.frozen(stream)) * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def directions(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """What a unit of each channel of the stream adds to the logits of tokens, and what they are without any."""
        assert self.unembedding is not None
        weight, bias = self.unembedding.weight, getattr(self.unembedding, "bias", None)
        rows = weight[ids].to(_wide(weight.dtype)) * self.factor  # pyright: ignore[reportIndexIssue]
        constant = self.frozen.bias.to(rows.dtype) @ rows.mT
        if isinstance(bias, Tensor):
            constant = constant + bias[ids].to(rows.dtype) * self.factor
        return self.frozen.back(rows).detach(), constant.detach()


class FrozenNorm:
    """A norm as an affine map: its scale is the one that it had on given rows.

        norm(x) = gain * (x - mean(x), or x) / s + bias

    Whether it centres, and its gain and bias, are told from how it acts on three vectors. None is the identity.
    """

    def __init__(self, norm: nn.Module | None, rows: Float[Tensor, "b c"]) -> None:
        dtype = _wide(rows.dtype)
        self.centred, self.scale = False, torch.ones(len(rows), 1, dtype=dtype, device=rows.device)
        self.gain = torch.ones(rows.shape[-1], dtype=dtype, device=rows.device)
        self.bias = torch.zeros_like(self.gain)
        if norm is None:
            return
        with torch.no_grad():

            def act(x: Tensor) -> Tensor:
                return norm.forward(x[None, None].to(rows))[0, 0].to(
                    dtype
                )  # not a call: hooks are for the model's runs

            probe = torch.ones_like(self.gain)
            probe[1::2] = -1
            probe[::3] *= 2
            self.bias = act(torch.zeros_like(probe))
            plain, lifted = act(probe) - self.bias, act(probe + 3) - self.bias
            self.centred = bool((plain - lifted).norm() < 1e-2 * plain.norm())
            self.gain = plain / self._centre(probe)
            shaped = self.gain * self._centre(rows.to(dtype))
            normed = norm.forward(rows[:, None])[:, 0].to(dtype) - self.bias
            self.scale = (normed * shaped).sum(-1, keepdim=True) / shaped.square().sum(-1, keepdim=True)

    def __call__(self, x: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        return (self.gain * self._centre(x.to(self.gain.dtype)) * self.scale + self.bias).to(x.dtype)

    def back(self, direction: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The transposed map without the bias: norm(x) . d = x . back(d) + bias . d."""
        return self._centre(direction * self.gain) * self.scale[:, None]

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class _Run:
    """One watched forward, read at one column."""

    sites: Sites
    seen: dict[str, Tensor]
    column: int
    final: Tensor
    logits: Tensor

    @classmethod
    def of(cls, where: str, model: nn.Module, inputs: Inputs, position: int) -> "_Run":
        check_decoder(where, model)
        ids, real = tokens(where, "inputs", inputs)
        device = embedding_device(model)
        ids, real, t = ids.to(device), real.to(device), ids.shape[1]
        if isinstance(position, bool) or not -t <= position < t:
            raise ValueError(f"{where}: position is {position}; the prompts have columns 0 to {t - 1} (-1 is the last)")
        column = position % t
        if not bool(real[:, column].all()):
            raise ValueError(f"{where}: position {position} is padding in some prompt; count from the end")
        sites = find_sites(model)
        given = arguments(model, ids, real)
        if takes(unwrap(model), "use_cache"):
            given["use_cache"] = False
        if column == t - 1 and takes(unwrap(model), "logits_to_keep"):
            given["logits_to_keep"] = 1
        wanted = [
            site for site in sites.all() if site.kind in ("residual", "heads", "projection", "final")
        ] + sites.writes()
        with torch.no_grad(), record(model, wanted) as seen:
            logits = model(**given).logits
        kept = {str(site): value for site, value in seen.items()}
        logits = logits[:, -1] if logits.shape[1] == 1 else logits[:, column]
        return cls(sites, kept, column, kept["final"][:, column], logits)

    def of_site(self, site: str) -> Tensor:
        value = self.seen[site]
        if value.ndim == 2 or value.shape[0] != len(self.final):  # batch and tokens in one axis
            value = value.reshape(len(self.final), -1, value.shape[-1])
        return value[:, self.column].to(_wide(value.dtype))


def _through(
    model: nn.Module, parts, before: Tensor, write: Tensor, directions: Tensor, layer: int
) -> Float[Tensor, "b n c"]:
    """Directions as the projection's output sees them: behind it may stand a factor, or a norm."""
    size = write.norm().clamp_min(1e-30)
    factor = float((before * write).sum() / before.square().sum().clamp_min(1e-30))
    bound = slack(next(model.parameters()).dtype)
    if (write - factor * before).norm() <= bound * size:
        return directions * factor
    for norm in parts.norms:
        frozen = FrozenNorm(norm, before.to(next(norm.parameters(), before).dtype))
        if (write - frozen(before)).norm() <= bound * size:
            return frozen.back(directions)
    raise UnsupportedModel(
        f"{type(unwrap(model)).__name__}: what layer {layer} adds to the stream is not what its projection gives, nor "
        "a norm of it; heads' shares of the logits cannot be told"
    )


def slack(dtype: torch.dtype) -> float:
    """Relative error of logits that is rounding."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.05


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _asked(where: str, asked: Tensor, b: int, size: int) -> Int[Tensor, "b n"]:
    ids = torch.as_tensor(asked)
    ids = ids.expand(b, -1) if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != b or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            f"{where}: tokens have shape {tuple(torch.as_tensor(asked).shape)}; give [b, n] with b = {b}, or [n]"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(
            f"{where}: tokens run from {int(ids.min())} to {int(ids.max())}; the model knows 0 to {size - 1}"
        )
    return ids.long()
