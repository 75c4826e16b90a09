"""The rows of efficient_local_attention.py, one function for each, and its picture."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from headwise.attention.efficient_local import VERSIONS, EfficientLocalAttention
from headwise.models.convert_efficient_local import add_attention
from headwise.papers._ela_setup import (
    CA,
    CA_GROUP,
    CA_WIDE,
    CLUTTERED,
    COMPARED,
    ELA_B,
    ELA_G4,
    ELA_OPEN,
    MARKED,
    NONE,
    SE,
    CoordinateAttention,
    Trained,
    canvases,
    evidence_share,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, figure

Found = Mapping[tuple[str, str], Trained]
PER_CHANNEL = {"T": 7, "B": 9, "S": 42, "L": 58}
RESNET50, ADDED = 25_557_032, {"T": 105_728, "B": 135_936, "S": 634_368, "L": 876_032}


def _accuracies(found: Found, task: str, *names: str) -> dict[str, float]:
    return {name: found[task, name].accuracy for name in names}


def _said(numbers: Mapping[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in numbers.items())


def _size(found: Found) -> int:
    """Parameters of the network without a module."""
    return sum(p.numel() for p in found[MARKED, NONE].model.parameters())


def attention_helps(found: Found) -> Measured:
    right = _accuracies(found, MARKED, NONE, CA, ELA_B, SE)
    plain = _accuracies(found, CLUTTERED, NONE, CA, ELA_B, SE)
    margin = min(right[CA], right[ELA_B]) - right[NONE] - 0.15
    return Measured(
        measured=_said({name: right[name] for name in (NONE, CA, ELA_B)}),
        control=f"{_said({SE: right[SE]})}; on clutter: {_said(plain)}",
        holds=margin >= 0,
        margin=margin,
        values=right | {f"{name}, clutter": value for name, value in plain.items()},
    )


def others_struggle(found: Found) -> Measured:
    right = _accuracies(found, MARKED, NONE, SE, CA, ELA_B)
    ratio = found[MARKED, CA].added / found[MARKED, ELA_B].added
    narrow = [one.squeeze for one in found[MARKED, CA].model.modules() if isinstance(one, CoordinateAttention)]
    reduces = all(layer.out_channels < layer.in_channels for layer in narrow)
    margin = min(right[NONE] + 0.05 - right[SE] - 1e-9, ratio - 2 - 1e-9, 0.0 if reduces else -1.0)
    return Measured(
        measured=(
            f"{_said({name: right[name] for name in (NONE, SE, CA)})}; coordinate attention has {ratio:.1f} times "
            f"ELA-B's parameters and {'fewer' if reduces else 'as many'} channels inside"
        ),
        control=f"{_said({ELA_B: right[ELA_B]})}, all channels inside",
        holds=margin >= 0,
        margin=margin,
        values=right | {"parameters, CA over ELA-B": ratio},
    )


def substantial(found: Found) -> Measured:
    right = _accuracies(found, MARKED, NONE, SE, ELA_B, ELA_G4)
    more = found[MARKED, ELA_B].added / _size(found)
    margin = min(right[ELA_B] - right[NONE] - 0.15, right[ELA_B] - right[SE] - 0.15, 0.05 - more - 1e-9)
    return Measured(
        measured=f"{_said(right)}; {more:.1%} more parameters",
        control=f"{_said({SE: right[SE]})} with {found[MARKED, SE].added / _size(found):.1%} more",
        holds=margin >= 0,
        margin=margin,
        values=right | {"parameters added": more},
    )


def coordinate_limits(found: Found) -> Measured:
    right = _accuracies(found, MARKED, CA, CA_GROUP, CA_WIDE)
    lighter = found[MARKED, CA].added > found[MARKED, ELA_B].added
    margin = min(right[CA_GROUP], right[CA_WIDE]) - right[CA] - 0.01
    margin = margin if lighter else min(margin, -1.0)
    return Measured(
        measured=f"{_said({name: right[name] for name in (CA_GROUP, CA_WIDE)})}; parameters {found[MARKED, CA].added} "
        f"and {found[MARKED, ELA_B].added} of ELA-B",
        control=_said({CA: right[CA]}),
        holds=margin >= 0,
        margin=margin,
        values=right,
    )


def localises(found: Found, run: Run) -> Measured:
    held = canvases(MARKED, run.seed, test=True)
    share = {name: evidence_share(found[MARKED, name], held).mean().item() for name in (ELA_B, NONE, SE, CA)}
    more = found[MARKED, ELA_B].added / _size(found)
    margin = min(share[ELA_B] - 0.6, share[ELA_B] - share[NONE] - 0.15, 0.05 - more - 1e-9)
    return Measured(
        measured=f"share of the evidence in the marked band: {_said({ELA_B: share[ELA_B]})}; "
        f"{more:.1%} more parameters, no narrower layer",
        control=_said({name: share[name] for name in (NONE, SE, CA)}),
        holds=margin >= 0,
        margin=margin,
        values={f"share, {name}": value for name, value in share.items()},
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def four_versions() -> Measured:
    from transformers import ResNetConfig, ResNetForImageClassification

    thousand: dict[str, Any] = {"num_labels": 1000}
    wrong, added = [], {}
    for version, each in PER_CHANNEL.items():
        for channels in (32, 256):
            if _count(EfficientLocalAttention(channels, version)) != each * channels:
                wrong.append(f"{version} of {channels} channels")
        with torch.device("meta"):
            model = ResNetForImageClassification(ResNetConfig(**thousand))
        plain = _count(model)
        added[version] = _count(add_attention(model, f"ela-{version.lower()}")) - plain
        if (plain, added[version]) != (RESNET50, ADDED[version]):
            wrong.append(f"{version} in ResNet-50: {plain} + {added[version]}")
    return Measured(
        measured=(
            f"parameters a channel {', '.join(f'{k} {v}' for k, v in PER_CHANNEL.items())}; in ResNet-50 "
            + ", ".join(f"{version} +{count:,}" for version, count in added.items())
            + ("" if not wrong else "; wrong: " + "; ".join(wrong))
        ),
        holds=not wrong and set(VERSIONS) == set(PER_CHANNEL),
        values={f"{version} in ResNet-50": float(count) for version, count in added.items()},
    )


def whole_networks() -> dict[str, Any]:
    """The three families at full size: random weights, norms that have seen a batch of noise."""
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        MobileNetV2ForSemanticSegmentation,
        ResNetConfig,
        ResNetForImageClassification,
    )

    made: dict[str, Any] = {
        "ResNet-50": ResNetForImageClassification(ResNetConfig()),
        "MobileNetV2": MobileNetV2ForImageClassification(MobileNetV2Config()),
        "DeepLabV3+ on MobileNetV2": MobileNetV2ForSemanticSegmentation(MobileNetV2Config()),
    }
    for model in made.values():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()
        with torch.no_grad():  # without statistics of its own a random MobileNet gives the same for every image
            model(torch.randn(16, 3, 64, 64))
        model.eval()
    return made


def integrates(run: Run) -> Measured:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(run.seed))
    added, near, fresh, sound = {}, {}, {}, True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        for name, model in whole_networks().items():
            plain, before = model(images).logits.detach(), _count(model)
            add_attention(model, "ela-b")
            new = [module for module in model.modules() if isinstance(module, EfficientLocalAttention)]
            out = model(images).logits
            out.square().sum().backward()
            grads = [parameter.grad for one in new for parameter in one.parameters()]
            sound &= out.shape == plain.shape and all(grad is not None and bool(grad.any()) for grad in grads)
            added[name] = _count(model) - before
            fresh[name] = ((out - plain).norm() / plain.norm()).item()
            for one in new:
                nn.init.zeros_(one.norm.weight)
                nn.init.constant_(one.norm.bias, 40.0)
            with torch.no_grad():
                near[name] = ((model(images).logits - plain).norm() / plain.norm()).item()
    margin = 1e-4 - max(near.values()) if sound else -1.0
    return Measured(
        measured=f"parameters added {', '.join(f'{name} {count:,}' for name, count in added.items())}; with open gates "
        f"logits change by {', '.join(f'{name} {value:.0e}' for name, value in near.items())}"
        + ("" if sound else "; shapes or gradients are wrong"),
        control="as they start: " + ", ".join(f"{name} {value:.2f}" for name, value in fresh.items()),
        holds=margin >= 0,
        margin=margin,
        values={f"change, open, {name}": value for name, value in near.items()}
        | {f"change, start, {name}": value for name, value in fresh.items()},
    )


def superior(found: Found) -> Measured:
    right = {task: _accuracies(found, task, ELA_B, CA, SE, NONE) for task in COMPARED}
    margin = min(one[ELA_B] - max(one[CA], one[SE], one[NONE]) for one in right.values()) - 1e-9
    opened = _accuracies(found, CLUTTERED, ELA_OPEN)
    return Measured(
        measured="; ".join(f"{task}: {_said({ELA_B: one[ELA_B]})}" for task, one in right.items())
        + f" ({_said(opened)})",
        control="; ".join(
            f"{task}: {_said({k: v for k, v in one.items() if k != ELA_B})}" for task, one in right.items()
        ),
        holds=margin >= 0,
        margin=margin,
        values={f"{task}, {name}": value for task, one in right.items() for name, value in one.items()}
        | {f"{CLUTTERED}, {ELA_OPEN}": opened[ELA_OPEN]},
    )


def beside_coordinate(found: Found) -> Measured:
    right = _accuracies(found, MARKED, ELA_B, CA)
    ratio = found[MARKED, ELA_B].added / found[MARKED, CA].added
    margin = min(right[ELA_B] - right[CA] + 0.05, 0.5 - ratio)
    return Measured(
        measured=f"{_said({ELA_B: right[ELA_B]})} with {ratio:.2f} of its parameters",
        control=_said({CA: right[CA]}),
        holds=margin >= 0,
        margin=margin,
        values=right | {"parameters, ELA-B over CA": ratio},
    )


@torch.no_grad()
def identities(run: Run) -> Measured:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        module, other = EfficientLocalAttention(32).train(), CoordinateAttention(32).train()
        x = torch.randn(4, 32, 9, 13)
    alone = (module(x[:1]) - module(x)[:1]).abs().max().item()
    turned = (module(x.mT) - module(x).mT).abs().max().item()
    mixed = (other(x[:1]) - other(x)[:1]).abs().max().item()
    nn.init.zeros_(module.norm.weight)
    nn.init.zeros_(module.norm.bias)
    quarter = torch.equal(module(x), x / 4)
    return Measured(
        measured=f"batch {alone:.0e}, transposed {turned:.0e}, a quarter {'exactly' if quarter else 'not'}",
        control=f"coordinate attention, batch: {mixed:.2f}",
        holds=max(alone, turned) <= 1e-6 and quarter and mixed > 1e-3,
        values={"batch": alone, "transposed": turned, "batch, CA": mixed},
    )


def draw(run: Run, found: Found) -> None:
    path = run.out / f"{run.paper.slug}.png"
    held = canvases(MARKED, run.seed, test=True)
    with figure(path, 3, width=4.4) as (shown, right, gates):
        shown.imshow(held.images[0, 0].numpy(), cmap="gray_r")
        shown.set_title(f"The bar marks a band; its digit is {held.labels[0]}")
        shown.set_axis_off()
        names = [*COMPARED[MARKED], *(name for name in COMPARED[CLUTTERED] if name not in COMPARED[MARKED])]
        for place, task in enumerate(COMPARED):
            at = [index for index, name in enumerate(names) if (task, name) in found]
            right.barh(
                [index + 0.2 - 0.4 * place for index in at],
                [found[task, names[index]].accuracy for index in at],
                0.38,
                label=task,
                color=COLOURS[place],
            )
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set_xlabel("test accuracy")
        right.set_title("Modules in one network")
        right.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=2, fontsize=8)
        share = {name: evidence_share(found[MARKED, name], held) for name in (NONE, SE, CA, ELA_B)}
        gates.boxplot([values.numpy() for values in share.values()], tick_labels=list(share), showfliers=False)
        gates.axhline(1 / 3, color="#a9aeb4", linewidth=1)
        gates.set_title("Evidence that lies in the marked band")
        gates.set_ylabel("share")
    run.figures.append(path)
