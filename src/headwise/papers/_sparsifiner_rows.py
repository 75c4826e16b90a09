"""The rows of sparsifiner.py, one function for each, and its picture."""

from collections.abc import Mapping
from typing import Any

import torch

from headwise.attention.softmax import SoftmaxAttention
from headwise.attention.sparsifiner import AttentionProducts, SparsifinerAttention, attention_products
from headwise.models.sparsifiner import SparsifinerConfig, SparsifinerViT
from headwise.papers._sparsifiner_setup import (
    BOTH,
    BOTH_NAME,
    LEARNED,
    ORACLE,
    RANDOM,
    TOKENS,
    UNTRAINED,
    WINDOW,
    Trained,
    small,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure

DEIT_S = (197, 384, 6)
SAVED, DROP = 0.48, 0.004  # the abstract's
TOKEN_KEEP = 0.3  # DeiT-S with both sparsities
TIE = 1e-9


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in values.items())


def digit_products(made: Trained) -> AttentionProducts:
    """Of the attention of one layer of the small network, with the mean density of its trained bases."""
    config = small()
    layers = made.predictor.attentions()
    density = sum(layer.mask_predictor.density() for layer in layers) / len(layers)
    return attention_products(config.num_tokens, config.hidden_size, config.num_attention_heads, density=density)


def structured(made: Trained) -> Measured:
    margin = made.mass[LEARNED] - made.mass[WINDOW] - TIE
    return Measured(
        measured=f"attention kept: learned {made.mass[LEARNED]:.1%}, window {made.mass[WINDOW]:.1%}",
        control=_listed({name: made.mass[name] for name in (RANDOM, UNTRAINED, ORACLE)}),
        holds=margin >= 0,
        margin=margin,
        values=made.mass,
    )


def predictor(made: Trained) -> Measured:
    deit = attention_products(*DEIT_S, density=1.0)
    cost, saving = deit.predictor / deit.dense, 1 - deit.sparse / deit.dense
    margin = min(made.mass[LEARNED] - 0.5, made.mass[LEARNED] - made.mass[UNTRAINED] - TIE, saving - cost)
    return Measured(
        measured=(
            f"attention kept by a quarter of the keys {made.mass[LEARNED]:.1%}; in DeiT-S the predictor costs "
            f"{cost:.1%} of the dense products, with a full basis, and saves {saving:.1%}"
        ),
        control=_listed({name: made.mass[name] for name in (RANDOM, UNTRAINED, WINDOW, ORACLE)}),
        holds=margin >= 0,
        margin=margin,
        values={f"mass, {name}": value for name, value in made.mass.items()} | {"cost": cost, "saving": saving},
    )


def sparse_masks(made: Trained) -> Measured:
    deit = attention_products(*DEIT_S, density=1.0)
    share = deit.sparse / deit.dense
    margin = min(made.mass[ORACLE] - 0.6, 0.3 - share)
    return Measured(
        measured=(
            f"the strongest quarter of the keys holds {made.mass[ORACLE]:.1%} of the dense attention; attention over a "
            f"quarter of the keys takes {share:.1%} of the products in DeiT-S"
        ),
        control=f"a random quarter holds {made.mass[RANDOM]:.1%}",
        holds=margin >= 0,
        margin=margin,
        values={"best": made.mass[ORACLE], "random": made.mass[RANDOM], "products": share},
    )


def pareto(made: Trained) -> Measured:
    gain = made.tuned[LEARNED] - made.tuned[TOKENS] - TIE
    margin = min(gain, made.products[TOKENS] - made.products[LEARNED])
    keep = made.networks[TOKENS].config.token_keep
    return Measured(
        measured=(
            f"{made.tuned[LEARNED]:.2%} at {made.products[LEARNED]:.1%} of the multiply-adds against "
            f"{made.tuned[TOKENS]:.2%} at {made.products[TOKENS]:.1%} (tokens pruned to {keep:.0%} twice)"
        ),
        control=f"dense {made.dense_accuracy:.2%}; both sparsities {made.tuned[BOTH_NAME]:.2%}",
        holds=margin >= 0,
        margin=margin,
        values={**made.tuned, **{f"products, {name}": value for name, value in made.products.items()}},
    )


def efficient(made: Trained) -> Measured:
    found, drop = digit_products(made), made.dense_accuracy - made.tuned[LEARNED]
    deit = [attention_products(*DEIT_S, density=share).saved for share in (1.0, 0.0)]
    margin = min(found.saved - SAVED, DROP - drop)
    return Measured(
        measured=(
            f"{found.saved:.1%} of the attention's products saved, accuracy {-drop:+.2%}; DeiT-S by the same formula: "
            f"{deit[0]:.1%} (full basis) to {deit[1]:.1%} (empty basis)"
        ),
        control=f"random keys of the same number, tuned alike: {made.tuned[RANDOM] - made.dense_accuracy:+.2%}",
        holds=margin >= 0,
        margin=margin,
        values={"saved": found.saved, "drop": drop, "drop, random": made.dense_accuracy - made.tuned[RANDOM]},
    )


def combined(made: Trained) -> Measured:
    with torch.device("meta"):
        model = SparsifinerViT(SparsifinerConfig(token_keep=TOKEN_KEEP))
        tokens = SparsifinerViT(SparsifinerConfig(token_keep=TOKEN_KEEP)).set_mode("dense")
    dense = model.products(dense=True)
    saved, alone = 1 - model.products(density=1.0) / dense, 1 - tokens.products() / dense
    drop = made.dense_accuracy - made.tuned[BOTH_NAME]
    margin = min(saved - 0.6 - TIE, 0.04 - drop)
    return Measured(
        measured=(
            f"DeiT-S, a quarter of the keys and {TOKEN_KEEP:.0%} of the tokens three times: {saved:.1%} of the "
            f"network's multiply-adds saved, with a full basis; digits with both ({BOTH:.0%} of the tokens twice): "
            f"{-drop:+.2%} at {made.products[BOTH_NAME]:.1%} of the multiply-adds"
        ),
        control=f"the same token pruning alone saves {alone:.1%}",
        holds=margin >= 0,
        margin=margin,
        values={"saved": saved, "saved by tokens": alone, "drop": drop},
    )


def at_once(made: Trained) -> Measured:
    drop = made.dense_accuracy - made.untuned[LEARNED]
    return Measured(
        measured=f"learned keys without tuning {-drop:+.2%} against dense {made.dense_accuracy:.2%}",
        control=_listed({name: made.untuned[name] for name in (RANDOM, UNTRAINED, WINDOW, ORACLE)}),
        holds=drop <= 0.04,
        margin=0.04 - drop,
        values={**made.untuned, "dense": made.dense_accuracy},
    )


def tuned(made: Trained) -> Measured:
    gain, over = made.tuned[LEARNED] - made.dense_accuracy, made.tuned[LEARNED] - made.tuned[RANDOM]
    margin = min(gain + 0.01, over - 0.015)
    return Measured(
        measured=f"tuned {made.tuned[LEARNED]:.2%}, {gain:+.2%} against dense, {over:+.2%} against random keys",
        control=f"dense {made.dense_accuracy:.2%}, random keys tuned alike {made.tuned[RANDOM]:.2%}",
        holds=margin >= 0,
        margin=margin,
        values={**made.tuned, "dense": made.dense_accuracy},
    )


def limit(made: Trained) -> Measured:
    torch.manual_seed(0)
    x, dense = torch.randn(2, 65, 32), SoftmaxAttention(32, 4).eval()
    layer = SparsifinerAttention(32, 4, 65, keep=1.0).eval()
    layer.load_dense(dense)
    trained: Any = made.predictor.attentions()[0]
    outs = []
    with torch.no_grad():
        whole = float((layer(x) - dense(x)).abs().max())
        for way in ("masked", "gather"):
            trained.implementation = way
            outs.append(trained(x))
    trained.implementation = "auto"
    forms = float((outs[0] - outs[1]).abs().max())
    margin = 1e-6 - max(whole, forms)
    return Measured(
        measured=f"keep 1: {whole:.1e} from dense attention; gathered and masked: {forms:.1e} apart",
        holds=margin >= 0,
        margin=margin,
        values={"keep 1": whole, "forms": forms},
    )


def products() -> Measured:
    full, empty = (attention_products(*DEIT_S, density=share) for share in (1.0, 0.0))
    margin = min(0.48 - full.saved, empty.saved - 0.48)
    return Measured(
        measured=(
            f"dense {full.dense / 1e6:.2f} M multiply-adds a layer, Sparsifiner "
            f"{(empty.predictor + empty.sparse) / 1e6:.1f} to {(full.predictor + full.sparse) / 1e6:.1f} M: "
            f"{full.saved:.1%} to {empty.saved:.1%} saved"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"full": full.saved, "empty": empty.saved},
    )


def draw(run: Run, made: Trained) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.6) as (mass, scores, trade):
        names = (RANDOM, UNTRAINED, WINDOW, LEARNED, ORACLE)
        mass.bar(range(len(names)), [100 * made.mass[name] for name in names], color=COLOURS[0])
        mass.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
        mass.set(ylabel="% of the dense attention", title="Kept by a quarter of the keys")
        both = (LEARNED, RANDOM)
        series = {
            "at once": [100 * made.untuned[name] for name in both],
            "tuned": [100 * made.tuned[name] for name in both],
        }
        bars(scores, list(both), series, y="accuracy on the digits, %", title="A quarter of the keys")
        scores.axhline(100 * made.dense_accuracy, color="#5b6168", linewidth=1, linestyle="--")
        points = {"dense": (1.0, made.dense_accuracy)} | {n: (made.products[n], made.tuned[n]) for n in made.products}
        for number, (name, (cost, score)) in enumerate(points.items()):
            label = "learned keys" if name == LEARNED else name
            trade.scatter([100 * cost], [100 * score], color=COLOURS[number % len(COLOURS)], label=label)
        trade.legend(fontsize=8)
        trade.set(xlabel="multiply-adds, % of dense", ylabel="accuracy, %", title="Tuned networks")
    run.figures.append(path)
