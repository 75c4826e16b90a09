"""The rows of class_semantics_attention.py, one function for each, and its picture."""

from collections.abc import Mapping

import torch

from headwise.attention.class_semantics import ClassSemanticsAttention
from headwise.models.boundary_matching import BoundaryMatchingConfig, BoundaryMatchingNetwork
from headwise.ops.boundary_matching import boundary_pairs, boundary_samples
from headwise.papers._class_semantics_setup import (
    BOTH,
    CONTROL,
    PLAIN,
    SE,
    SEMANTICS,
    Detected,
    detected,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure
from headwise.tasks.untrimmed_videos import ActionVideos

Found = Mapping[str, Detected]


def semantics(found: Found, test: ActionVideos) -> Measured:
    own = found[SEMANTICS]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(test.scores.shape[-1], generator=generator)
    others = {
        "another video's scores": detected(own.model, test, test.scores.roll(1, 0)).precision,
        "its own in another order": detected(own.model, test, test.scores[..., order]).precision,
    }
    margin = min(own.precision - value - 0.02 for value in others.values())
    return Measured(
        measured="; ".join(f"weights from {name}: {value:.3f}" for name, value in others.items()),
        control=f"from its own scores: {own.precision:.3f}",
        holds=margin >= 0,
        margin=margin,
        values={"own": own.precision, **others},
    )


def gain(found: Found) -> Measured:
    csa, control = found[SEMANTICS].precision, found[CONTROL].precision
    margin = min(csa - found[PLAIN].precision - 0.02, csa - control - 1e-9)
    return _compared(found, SEMANTICS, (PLAIN, CONTROL), margin)


def over_self_attention(found: Found) -> Measured:
    fair = found[SE].parameters <= found[SEMANTICS].parameters
    margin = found[SEMANTICS].precision - found[SE].precision - 0.02
    return _compared(found, SEMANTICS, (SE,), margin if fair else min(margin, -1.0))


def complementary(found: Found) -> Measured:
    margin = min(found[BOTH].precision - found[arm].precision for arm in (SEMANTICS, SE)) - 0.005
    return _compared(found, BOTH, (SEMANTICS, SE), margin)


def _compared(found: Found, arm: str, others: tuple[str, ...], margin: float) -> Measured:
    def words(name: str) -> str:
        one = found[name]
        return (
            f"{name} {one.precision:.3f} (at IoU 0.5 {one.half:.3f}, recall {one.recall:.3f}, best proposal on a "
            f"distractor {one.fooled:.0%}, {one.parameters:,} parameters)"
        )

    return Measured(
        measured=words(arm),
        control="; ".join(words(name) for name in others),
        holds=margin >= 0,
        margin=margin,
        values={name: found[name].precision for name in (arm, *others)},
    )


@torch.no_grad()
def identities() -> Measured:
    generator = torch.Generator().manual_seed(0)
    features, scores = torch.randn(4, 32, 24, generator=generator), torch.randn(4, 8, 24, generator=generator)
    rest = ClassSemanticsAttention(8, 32, reduction=2)
    last = [rest.channel[-1] if isinstance(rest.channel, torch.nn.Sequential) else None, rest.time]
    for layer in last:
        for parameter in () if layer is None else layer.parameters():
            parameter.zero_()
    still = torch.equal(rest(features, scores), features)
    squeeze = ClassSemanticsAttention(8, 32, reduction=2, branches=("channel",), source="features")
    weight = dict(squeeze.named_parameters())
    hidden = (features.mean(-1) @ weight["channel.0.weight"].T + weight["channel.0.bias"]).relu()
    gate = (hidden @ weight["channel.2.weight"].T + weight["channel.2.bias"]).sigmoid()
    apart = float((squeeze(features) - gate[..., None] * features).abs().max())
    margin = min(0.0 if still else -1.0, 1e-6 - apart)
    return Measured(
        measured=f"at rest {'equal' if still else 'other'} bits; from squeeze-and-excitation {apart:.1e} at most",
        holds=margin >= 0,
        margin=margin,
        values={"difference": apart},
    )


@torch.no_grad()
def network_is_bmn() -> Measured:
    with torch.device("meta"):
        count = sum(p.numel() for p in BoundaryMatchingNetwork(BoundaryMatchingConfig()).parameters())
    torch.manual_seed(0)
    model, steps = BoundaryMatchingNetwork(BoundaryMatchingConfig(temporal_scale=24)), 24
    x = torch.randn(1, 256, steps)
    starts, ends = boundary_pairs(steps)
    dense = boundary_samples(steps).to_dense().view(-1, 32, steps)
    samples = torch.einsum("pnt,bct->bcnp", dense, x)[..., None]
    official = model.sample_conv(samples).squeeze(-1).squeeze(2)
    ours = model._segments(x)[:, :, starts, ends]
    apart = float((ours - official).abs().max() / official.abs().max())
    margin = min(0.0 if count == 4_978_564 else -1.0, 1e-4 - apart)
    return Measured(
        measured=f"{count:,} parameters; the two orders differ by {apart:.1e} of the largest",
        holds=margin >= 0,
        margin=margin,
        values={"parameters": float(count), "difference": apart},
    )


@torch.no_grad()
def draw(run: Run, found: Found, test: ActionVideos) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.4) as (precision, video, gates):
        series = {arm: [one.precision, one.half] for arm, one in found.items()}
        bars(precision, ["IoU 0.3 to 0.7", "IoU 0.5"], series, y="average precision", title="150 test videos")
        precision.set_ylim(0, 1.45 * max(max(values) for values in series.values()))
        precision.legend(fontsize=7, ncols=2, loc="upper left")
        number = next((i for i, false in enumerate(test.distractors) if len(false) > 1), 0)
        steps = test.scores.shape[-1]
        image = video.imshow(test.scores[number].tolist(), aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2)
        for start, end in test.segments[number]:
            video.axvspan(start * steps - 0.5, end * steps - 0.5, fill=False, edgecolor="#1b1f24", linewidth=1.6)
        video.grid(visible=False)
        video.set(xlabel="step", ylabel="class", title="Class scores of a video, action framed")
        if video.figure is not None:
            video.figure.colorbar(image, ax=video, fraction=0.06, pad=0.03)
        csa = found[SEMANTICS].model.csa
        weights = csa.gates(test.scores[number : number + 1].to(run.device))
        time = weights["time"][0].mean(0).tolist()
        gates.plot(range(steps), time, color=COLOURS[0], label="temporal weights, mean over channels")
        channel = sorted(weights["channel"][0, :, 0].tolist())
        places = [i * (steps - 1) / (len(channel) - 1) for i in range(len(channel))]
        gates.plot(places, channel, color=COLOURS[1], label="channel weights, sorted")
        for start, end in test.segments[number]:
            gates.axvspan(start * steps - 0.5, end * steps - 0.5, color="#1b1f24", alpha=0.08)
        gates.set(xlabel="step", ylabel="weight", title="Its weights", ylim=(0, 1.3))
        gates.legend(fontsize=8, loc="upper left")
    run.figures.append(path)
