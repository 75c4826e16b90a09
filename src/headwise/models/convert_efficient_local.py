"""Put efficient local attention into the blocks of a convolutional network: ResNet, MobileNet, DeepLab on either.

Blocks are known by their structure, as torchvision, timm and transformers build them: in a ResNet the module goes on
the residual branch after the last normalisation, in a MobileNet after the depthwise convolution of each block, and
where a block has a squeeze-and-excitation module it takes that one's place.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

from torch import nn

from headwise.attention.efficient_local import VERSIONS, EfficientLocalAttention
from headwise.errors import UnsupportedModel

__all__ = ["CONVERTERS", "add_attention"]


@dataclass
class _Site:
    """A place for a module: the child `name` of `owner`, which is replaced or followed by it."""

    owner: nn.Module
    name: str
    channels: int
    replaces: bool = False


def add_attention(
    model: nn.Module,
    to: str = "ela-b",
    *,
    where: str | Mapping[str, int] = "block",
    layers: Iterable[int] | None = None,
    fit_groups: bool = False,
    **options: Any,
) -> nn.Module:
    """Insert a module into every block of a network, in place, and return the network.

    to: "ela-t", "ela-b", "ela-s" or "ela-l". where: "block", or names of modules and the channels of their output
    `[b c h w]`, which the new modules then follow (necks of detectors). layers: numbers of the blocks, in the order of
    the network's modules; None is all. fit_groups: where the version's norm groups do not divide the channels, take
    their greatest common divisor instead of refusing. options: of `EfficientLocalAttention`; `identity_init=True` for
    a trained network, whose activations a fresh module otherwise divides by about four.
    A module that is followed becomes a `Sequential` of it and the new one, so load weights first.
    Raises UnsupportedModel for a network without such blocks, ValueError for what does not fit; then nothing changes.
    """
    version = to.lower().removeprefix("ela-").upper()
    if not to.lower().startswith("ela-") or version not in VERSIONS:
        raise ValueError(f"add_attention: to is {to!r}; choose ela-t, ela-b, ela-s or ela-l")
    sites = _named(model, where) if isinstance(where, Mapping) else _blocks(model, where)
    if layers is not None:
        chosen = sorted(set(layers))
        if wrong := [layer for layer in chosen if not 0 <= layer < len(sites)]:
            raise ValueError(f"add_attention: layers names {wrong[0]}; there are blocks 0 to {len(sites) - 1}")
        sites = [sites[layer] for layer in chosen]
    made = []
    for site in sites:
        old = getattr(site.owner, site.name)
        if old is not None and any(isinstance(one, EfficientLocalAttention) for one in old.modules()):
            raise ValueError(f"add_attention: {type(site.owner).__name__}.{site.name} has this attention already")
        like = next(site.owner.parameters(), None)
        given = {} if like is None else {"device": like.device, "dtype": like.dtype}
        groups = options.get("norm_groups") or (1 if options.get("variant") == "timm" else VERSIONS[version][2])
        if fit_groups and site.channels % groups:
            given["norm_groups"] = gcd(site.channels, groups)
        new = EfficientLocalAttention(site.channels, version, **{**options, **given})
        made.append(new.train(site.owner.training))
    for site, new in zip(sites, made, strict=True):
        old = getattr(site.owner, site.name)
        setattr(site.owner, site.name, new if site.replaces else nn.Sequential(old, new))
    return model


def _blocks(model: nn.Module, where: str) -> list[_Site]:
    if where != "block":
        raise ValueError(f"add_attention: where is {where!r}; expected 'block', or a dict of module names and channels")
    sites = [site for module in model.modules() for rule in RULES if (site := rule(module)) is not None]
    if not sites:
        raise UnsupportedModel(
            f"add_attention: {type(model).__name__} has no residual blocks as torchvision, timm or transformers build "
            "them for ResNet and MobileNet; say where, as where={'neck.reduce': 256}"
        )
    return sites


def _named(model: nn.Module, where: Mapping[str, int]) -> list[_Site]:
    known, sites = dict(model.named_modules()), []
    for path, channels in where.items():
        owner, _, name = path.rpartition(".")
        if path not in known or not name:
            raise ValueError(f"add_attention: where names {path!r}, which is no module of {type(model).__name__}")
        sites.append(_Site(known[owner], name, channels))
    return sites


def _channels(module: nn.Module) -> int:
    """Channels of what a module of convolutions and norms gives."""
    for one in reversed(list(module.modules())):
        if isinstance(one, nn.Conv2d):
            return one.out_channels
        if isinstance(one, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            return one.num_features if hasattr(one, "num_features") else one.num_channels  # type: ignore[union-attr]
    raise UnsupportedModel(f"add_attention: {type(module).__name__} has neither a convolution nor a norm to count by")


def _is_depthwise(module: nn.Module) -> bool:
    first = next((one for one in module.modules() if isinstance(one, nn.Conv2d)), None)
    return first is not None and first.groups == first.out_channels > 1


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _timm(module: nn.Module) -> _Site | None:
    if _has(module, "se", "conv_dw"):
        return _Site(module, "se", module.conv_dw.out_channels, replaces=True)  # type: ignore[union-attr]
    if _has(module, "se", "conv1", "bn2"):
        last = module.bn3 if hasattr(module, "bn3") else module.bn2
        return _Site(module, "se", _channels(last), replaces=True)  # type: ignore[arg-type]
    return None


def _torchvision_resnet(module: nn.Module) -> _Site | None:
    if not _has(module, "conv1", "bn1", "conv2", "bn2", "downsample") or hasattr(module, "se"):
        return None
    name = "bn3" if hasattr(module, "bn3") else "bn2"
    return _Site(module, name, _channels(getattr(module, name)))


def _torchvision_mobilenet(module: nn.Module) -> _Site | None:
    inner = getattr(module, "conv", None) or getattr(module, "block", None)
    if not isinstance(inner, nn.Sequential) or not hasattr(module, "use_res_connect"):
        return None
    for place, child in enumerate(inner):
        if _is_depthwise(child):
            after = inner[place + 1] if place + 1 < len(inner) else None
            squeezes = after is not None and _has(after, "avgpool", "fc1", "fc2")
            return _Site(inner, str(place + squeezes), _channels(child), replaces=squeezes)
    return None


def _transformers_resnet(module: nn.Module) -> _Site | None:
    inner = getattr(module, "layer", None)
    if not isinstance(inner, nn.Sequential) or not _has(module, "shortcut", "activation"):
        return None
    return _Site(inner, str(len(inner) - 1), _channels(inner[-1]))


def _transformers_mobilenet(module: nn.Module) -> _Site | None:
    if _has(module, "conv_3x3", "reduce_1x1") and _is_depthwise(module.conv_3x3):  # type: ignore[arg-type]
        return _Site(module, "conv_3x3", _channels(module.conv_3x3))  # type: ignore[arg-type]
    return None


RULES: tuple[Callable[[nn.Module], _Site | None], ...] = (
    _timm,
    _torchvision_resnet,
    _torchvision_mobilenet,
    _transformers_resnet,
    _transformers_mobilenet,
)


def _convert(name: str, model: nn.Module, layers: Iterable[int] | None = None, **options: Any) -> nn.Module:
    return add_attention(model, name, layers=layers, **options)


# What `headwise.convert` finds: name -> function(model, layers=None, **options).
CONVERTERS: dict[str, Callable[..., nn.Module]] = {
    f"ela-{version.lower()}": partial(_convert, f"ela-{version.lower()}") for version in VERSIONS
}
