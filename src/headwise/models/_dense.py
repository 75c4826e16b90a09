"""What segmenters and detectors share: a backbone by name, and its feature maps merged into one.

    maps -> norm, 1 x 1 to one width, resampled to the finest, summed -> 3 x 3, norm, GELU

The same for all, so that what differs is the backbone. Those by name:

    davit         windows over space and groups over channels, in turn     DaViT
    neighborhood  (dilated) neighbourhood attention, NAT and DiNAT          transformers' DiNAT, without NATTEN
    agent         agent attention                                          AgentDeiT, one map
    ela-resnet    a ResNet with efficient local attention in its blocks     transformers' ResNet, converted
    small-vit     any class of `headwise.attention`                         SmallViT, one map
    swin, resnet  softmax in shifted windows; no attention: controls        transformers
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from headwise.models.agent_deit import AgentDeiT
from headwise.models.convert_efficient_local import add_attention
from headwise.models.davit import DaViT
from headwise.models.dinat import provide_natten
from headwise.models.small_vit import SmallViT


def _dinat() -> Any:
    from transformers import DinatBackbone

    return DinatBackbone


def _swin() -> Any:
    from transformers import SwinBackbone

    return SwinBackbone


def _resnet() -> Any:
    from transformers import ResNetBackbone

    return ResNetBackbone


# Name -> what gives the class; those of transformers are imported when they are asked for.
BACKBONES: Mapping[str, Callable[[], Any]] = {
    "davit": lambda: DaViT,
    "neighborhood": _dinat,
    "agent": lambda: AgentDeiT,
    "ela-resnet": _resnet,
    "small-vit": lambda: SmallViT,
    "swin": _swin,
    "resnet": _resnet,
}


class DenseConfig(PreTrainedConfig):
    """A backbone by name with its config, and the width of the merged map.

    backbone: a name of `BACKBONES`. backbone_config: arguments of the backbone's config class that differ from its
    defaults, and for ela-resnet `ela`, the version ("ela-b"). All stages of a pyramid are used; the image size of
    small-vit and agent is fixed. num_labels: classes, 2 unless given.
    """

    def __init__(
        self,
        backbone: str = "davit",
        backbone_config: dict[str, Any] | None = None,
        head_width: int = 32,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("id2label") is None:  # a saved config has the classes by name
            kwargs.setdefault("num_labels", 2)
        super().__init__(**kwargs)
        _class(backbone)
        self.backbone, self.backbone_config, self.head_width = backbone, dict(backbone_config or {}), head_width

    @classmethod
    def example(cls) -> Any:
        """A small one."""
        sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_heads": [2, 4], "window_size": 3}
        return cls("davit", sizes, head_width=16, num_labels=3)


class DenseModel(PreTrainedModel):
    """The backbone and the merged map; a subclass adds what it says of every place.

    Heads of headwise's own backbones can be probed and edited as in the backbone alone.
    """

    config: Any
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.head_width
        self.backbone: Any = _make(config.backbone, config.backbone_config)
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, channels), nn.Conv2d(channels, width, 1)) for channels in self._channels()
        )
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(1, width), nn.GELU())
        self._add_head(config)
        self.post_init()

    def _add_head(self, config: Any) -> None:
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        """The head keeps torch's start, the backbone its own."""

    @classmethod
    def from_backbone(
        cls, backbone: str, source: str, *, id2label: Mapping[int, str], head_width: int = 256, **kwargs: Any
    ) -> Any:
        """A model whose backbone has the weights of a checkpoint, a folder or a hub id; its head is untrained.

        The checkpoint of a classifier will do. kwargs: further arguments of the config.
        Raises ValueError for an unknown backbone, OSError for what cannot be loaded.
        """
        found = _class(backbone).config_class.from_pretrained(source)
        sizes = {key: value for key, value in found.to_diff_dict().items() if key not in _NOT_SIZES}
        names = {name: index for index, name in id2label.items()}
        config_class: Any = cls.config_class
        model = cls(
            config_class(backbone, sizes, head_width=head_width, id2label=dict(id2label), label2id=names, **kwargs)
        )
        with _lent(backbone):
            options: dict[str, Any] = {"out_features": _stages(found)} if hasattr(found, "stage_names") else {}
            trained = _class(backbone).from_pretrained(source, **options)
        if backbone == "ela-resnet":
            add_attention(trained, sizes.get("ela", "ela-b"), fit_groups=True, identity_init=True)
        state = {key: x for key, x in trained.state_dict().items() if not key.startswith(("head.", "head_dist."))}
        model.backbone.load_state_dict(state)
        return model

    def maps(self, pixel_values: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d u v"]]:
        """The backbone's feature maps, the finest first. Raises ValueError for images that it does not take."""
        if hasattr(self.backbone, "forward_features") and hasattr(self.backbone.config, "grid_size"):
            rows, columns = self.backbone.config.grid_size
            tokens = self.backbone.forward_features(pixel_values)[:, -rows * columns :]
            return [tokens.mT.unflatten(2, (rows, columns))]
        with _lent(self.config.backbone):
            return list(self.backbone(pixel_values).feature_maps)

    def merged(self, pixel_values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d u v"]:
        """The maps as one, at the resolution of the finest."""
        maps = self.maps(pixel_values)
        parts = [resample(lateral(one), maps[0].shape[2:]) for lateral, one in zip(self.laterals, maps, strict=True)]
        return self.mix(torch.stack(parts).sum(0))

    def _channels(self) -> list[int]:
        """Channels of every map."""
        config = self.backbone.config
        return list(self.backbone.channels) if hasattr(config, "stage_names") else [config.hidden_size]


_NOT_SIZES = {
    "transformers_version", "architectures", "model_type", "out_features", "out_indices", "stage_names", "dtype",
    "id2label", "label2id", "problem_type",
}  # fmt: skip


def _class(name: str) -> Any:
    if name not in BACKBONES:
        raise ValueError(f"backbone is {name!r}; choose {', '.join(BACKBONES)}")
    return BACKBONES[name]()


def _lent(name: str) -> contextlib.AbstractContextManager[Any]:
    """While a backbone is made and run: DiNAT asks for NATTEN's functions."""
    return provide_natten() if name == "neighborhood" else contextlib.nullcontext()


def _stages(config: Any) -> list[str]:
    return [name for name in config.stage_names if name != "stem"]


def _make(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    """The backbone with random weights, without a classifier."""
    given = dict(sizes)
    version = given.pop("ela", "ela-b")
    kind = _class(name)
    try:
        config = kind.config_class(**given)
    except TypeError as error:
        raise ValueError(f"backbone_config of {name}: {error}") from error
    if hasattr(config, "stage_names"):
        config.out_features = _stages(config)
    with _lent(name):
        made = kind(config)
    if name == "ela-resnet":
        add_attention(made, version, fit_groups=True)
    if hasattr(config, "grid_size"):
        made.head = nn.Identity()  # no part of what is trained
        if getattr(made, "head_dist", None) is not None:
            made.head_dist = nn.Identity()
    return made


def resample(x: Tensor, size: Any) -> Tensor:
    if x.shape[2:] == size:
        return x
    return nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
