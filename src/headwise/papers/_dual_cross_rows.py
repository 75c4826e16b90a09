"""The rows of dual_cross_attention.py, one function for each, and its picture."""

from typing import Any

import torch

from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.ops.counting import flops
from headwise.papers._dual_cross_setup import (
    BACKBONES,
    DUAL,
    LOCAL,
    LONGER,
    MEAN,
    PAIR,
    PLAIN,
    RANDOM,
    Results,
    part_shares,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure
from headwise.tasks.digits import digit_images

LARGE = "large"
PATCHES, TINY = (448, 16), (192, 12, 3)  # pixels and patch of the cost row; width, blocks and heads of DeiT-Tiny


def glca(found: Results) -> Measured:
    digits = {arm: found.digits[LARGE, arm].both for arm in (PLAIN, LOCAL, MEAN, RANDOM)}
    margin = min(digits[LOCAL] - digits[PLAIN] - 0.01, digits[MEAN] - digits[RANDOM] - 1e-9)
    return Measured(
        measured=(
            f"{digits[LOCAL]:.1%} with GLCA (SA alone of the same model {found.digits[LARGE, LOCAL].alone:.1%}); "
            f"{digits[MEAN]:.1%} where the mean of its tokens is read"
        ),
        control=f"the mean with random queries {digits[RANDOM]:.1%}, baseline {digits[PLAIN]:.1%}",
        holds=margin >= 0,
        margin=margin,
        values=digits,
    )


def pwca(found: Results) -> Measured:
    arms = {arm: found.digits[LARGE, arm] for arm in (PLAIN, PAIR, LONGER)}
    gaps = {arm: one.trained_on - one.alone for arm, one in arms.items()}
    margin = min(
        arms[PAIR].alone - arms[PLAIN].alone - 0.03,
        arms[PAIR].alone - arms[LONGER].alone - 1e-9,
        gaps[PLAIN] - gaps[PAIR] - 1e-9,
    )

    def words(arm: str) -> str:
        return f"{arm} {arms[arm].alone:.1%} (training images {arms[arm].trained_on:.1%}, {found.seconds[arm]:.0f} s)"

    return Measured(
        measured=words(PAIR),
        control=f"{words(PLAIN)}; {words(LONGER)}",
        holds=margin >= 0,
        margin=margin,
        values={arm: one.alone for arm, one in arms.items()} | {f"{arm}: gap": gap for arm, gap in gaps.items()},
    )


def attention(found: Results) -> Measured:
    plain, dual = found.people[LARGE, PLAIN], found.people[LARGE, DUAL]
    even = float(part_shares(found.seen.parts)[..., 0].mean())
    margin = min(
        plain.background - dual.background - 1e-9, dual.entropy - plain.entropy - 1e-9, dual.parts - plain.parts - 1e-9
    )

    def words(one: Any) -> str:
        return (
            f"{one.background:.1%} on the background, entropy {one.entropy:.3f} of the largest, {one.parts:.2f} parts"
        )

    return Measured(
        measured=words(dual),
        control=f"baseline {words(plain)}; an even response {even:.1%} on the background",
        holds=margin >= 0,
        margin=margin,
        values={
            f"{name}: {what}": getattr(one, what)
            for name, one in ((PLAIN, plain), (DUAL, dual))
            for what in ("background", "entropy", "parts")
        },
    )


def consistent(found: Results) -> Measured:
    pairs = {"digits, large": (found.digits[LARGE, DUAL].both, found.digits[LARGE, PLAIN].both)}
    pairs |= {f"people, {size}": (found.people[size, DUAL].both, found.people[size, PLAIN].both) for size in BACKBONES}
    margin = min(dual - plain - 0.01 for dual, plain in pairs.values())
    return Measured(
        measured="; ".join(f"{name} {100 * (dual - plain):+.1f} points" for name, (dual, plain) in pairs.items()),
        control="; ".join(f"{name} baseline {plain:.1%}" for name, (_, plain) in pairs.items()),
        holds=margin >= 0,
        margin=margin,
        values={name: dual - plain for name, (dual, plain) in pairs.items()},
    )


def reidentification(found: Results) -> Measured:
    gains = {size: found.people[size, DUAL].both - found.people[size, PLAIN].both for size in BACKBONES}
    margin = min(gains["small"] - 0.028, gains["large"] - 0.024)

    def words(size: str, arm: str) -> str:
        one = found.people[size, arm]
        alone = f", SA alone {one.alone:.1%}" if arm == DUAL else ""
        return f"{size} {one.both:.1%} mAP ({one.rank:.1%} rank 1{alone})"

    return Measured(
        measured="; ".join(f"{words(size, DUAL)}, {100 * gains[size]:+.1f} points" for size in BACKBONES),
        control="baselines: " + "; ".join(words(size, PLAIN) for size in BACKBONES),
        holds=margin >= 0,
        margin=margin,
        values={f"{size}: {arm}": found.people[size, arm].both for size in BACKBONES for arm in (PLAIN, DUAL)},
    )


def self_alone(found: Results) -> Measured:
    one = found.digits[LARGE, DUAL]
    margin = 0.02 - (one.both - one.alone)
    return Measured(
        measured=f"SA alone {one.alone:.1%}, with GLCA {one.both:.1%}",
        holds=margin >= 0,
        margin=margin,
        values={"SA": one.alone, "SA and GLCA": one.both},
    )


@torch.no_grad()
def pairs_vanish(found: Results) -> Measured:
    model: Any = found.digits[LARGE, DUAL].model
    images = digit_images(200).test_images[:64].to(next(model.parameters()).device)
    paired = model(images, partner=torch.arange(len(images), device=images.device)).branch_logits
    apart = float((paired["pair"] - paired["self"]).abs().max())
    with_pairs = model(images).branch_logits["self"]
    model.config.pwca = False
    same = torch.equal(model(images).branch_logits["self"], with_pairs)
    model.config.pwca = True
    margin = min(1e-5 - apart, 0.0 if same else -1.0)
    return Measured(
        measured=f"paired with itself, scores differ by {apart:.1e}; without pairs {'equal' if same else 'other'} bits",
        holds=margin >= 0,
        margin=margin,
        values={"difference": apart},
    )


@torch.no_grad()
def cost() -> Measured:
    """Counts on the meta device: no image is seen."""
    plain, local, mean, random, pairs = (
        _counted(**options)
        for options in (
            {"glca_layers": 0, "pwca": False},
            {"pwca": False},
            {"pwca": False, "readout": "mean"},
            {"pwca": False, "readout": "mean", "selection": "random"},
            {},
        )
    )
    parameters, share = local[0] - plain[0], local[0] / plain[0] - 1
    operations, selecting, class_alone = (counts[1] / plain[1] - 1 for counts in (random, mean, local))
    margin = min(
        0.0 if parameters == 483_848 else -1.0,
        share - 0.085,
        0.095 - share,
        operations - 0.01,
        0.04 - operations,
        0.0 if pairs == local else -1.0,
    )
    return Measured(
        measured=(
            f"{parameters:,} parameters (+{share:.1%}), operations +{operations:.1%}; +{selecting:.1%} with the "
            f"rollout, whose maps fused attention does not keep; +{class_alone:.1%} where the class token alone is read"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"parameters": share, "operations": operations, "with the rollout": selecting, "class": class_alone},
    )


def _counted(**options: Any) -> tuple[int, int]:
    """Parameters and floating-point operations of one image; weights of the loss are no part of the network."""
    from transformers import ViTConfig, ViTModel

    width, blocks, heads = TINY
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
    config = ViTConfig(intermediate_size=4 * width, image_size=PATCHES[0], patch_size=PATCHES[1], **sizes)
    with torch.device("meta"):
        vit: Any = ViTModel(config)
        model: Any = DualCrossAttention(vit, 200, **options).eval()
        images = torch.zeros(1, 3, PATCHES[0], PATCHES[0])
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("loss_weights"))
    return parameters, flops(model, {"pixel_values": images})


def draw(run: Run, found: Results) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.4) as (digits, people, looks):
        arms = {arm: [100 * found.digits[LARGE, arm].both] for arm in (PLAIN, LONGER, LOCAL, MEAN, RANDOM, PAIR, DUAL)}
        bars(digits, [""], arms, y="right of 597 digits, %", title="200 training digits")
        digits.set_ylim(60, 110)
        digits.legend(fontsize=7, ncols=2, loc="upper left")
        gains = {arm: [100 * found.people[size, arm].both for size in BACKBONES] for arm in (PLAIN, DUAL)}
        bars(people, [f"{size} backbone" for size in BACKBONES], gains, y="mAP, %", title="People, found again")
        people.set_ylim(0, 115)
        shares = part_shares(found.seen.parts)
        names = ("background", "head", "torso", "legs", "bag")
        for i, arm in enumerate((PLAIN, DUAL)):
            response = found.people[LARGE, arm].responses
            mass = [float((response * shares[..., part]).sum(1).mean()) for part in range(5)]
            looks.bar([part + 0.4 * i - 0.2 for part in range(5)], mass, 0.38, color=COLOURS[i], label=arm)
        even = shares.mean((0, 1)).tolist()
        looks.scatter(range(5), even, marker="_", s=300, color="#1b1f24", label="even response", zorder=3)
        looks.set_xticks(range(5), list(names))
        looks.set(ylabel="share of the response", title="Where the class token looks")
        looks.legend(fontsize=8)
    run.figures.append(path)
