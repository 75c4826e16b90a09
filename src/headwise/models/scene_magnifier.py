"""A decoder that reads a scene in coarse tokens and looks closer where its own attention goes.

    layer l >= S:  select[row] = regions that the row's attention over the coarse keys prefers
    layer l > S:   softmax over [keys | W_k F, W_v F of the regions that layer l - 1 selected]

F are the fine tokens; each stands at its coarse token's position. Any causal language model of transformers on its
attention interface can be the decoder; it keeps its weights, and without a scene it computes what it did.
Only rows of text behind the scene look closer. Pictures work alike: coarse tokens are pooled patches, fine ones
patches.

    model = SceneMagnifier.from_decoder(llama, scene_dim=768, scene_token_id=7, start_layer=8)
    model.generate(input_ids=ids, coarse=coarse, fine=fine)        # ids hold scene_token_id once per coarse token

Paper: headwise/papers/lscenellm.py (Zhi et al., CVPR 2025).
Notes: the official code slices every item of a batch where the text of the first one begins, projects the fine tokens
anew for every generated token, and computes two softmaxes over all keys; here rows are told apart item by item, the
keys of a scene are made once (`encode_scene`) and kept with the cache, and a generated token reads the fine keys that
it selects. The official code leaves `centers` out where there are fine tokens; so does a call without them.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from headwise.attention.softmax import split_heads
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.projections import attention_shape
from headwise.hf.steps import CACHE_NAMES
from headwise.models._scene_attention import (
    NAME,
    EncodedScene,
    Held,
    Run,
    by_layer,
    involved,
    note_positions,
    under_way,
)
from headwise.ops.regions import THRESHOLD, select_regions

__all__ = ["EncodedScene", "SceneMagnifier", "SceneMagnifierConfig"]

HELD = "_headwise_scene"  # where a cache keeps the scene that it was filled with


class SceneMagnifierConfig(PreTrainedConfig):
    """text_config: of the decoder. scene_dim: width of the scene's features. scene_token_id: the token of the decoder's
    vocabulary that holds the place of a coarse token.

    start_layer: the first layer that selects; the next ones magnify. layers: those that magnify, all after it if None.
    threshold, max_regions: of `select_regions` (its top_k). warm_up: in training the magnified output has
    the share min(1, warm_up * step_ratio), 1 where it is -1; `model.step_ratio` is for the training loop to set.
    projector: "mlp" (three linear layers with ReLU) or "linear".
    """

    model_type = "headwise-scene-magnifier"
    sub_configs: ClassVar[Any] = {"text_config": AutoConfig}  # as transformers declares it

    def __init__(
        self,
        text_config: Any = None,
        scene_dim: int = 768,
        scene_token_id: int = 0,
        start_layer: int = 8,
        layers: Sequence[int] | None = None,
        threshold: float = THRESHOLD,
        max_regions: int | None = None,
        warm_up: float = -1.0,
        projector: str = "mlp",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**{"model_type": "llama", **text_config})
        self.text_config = text_config
        count = text_config.num_hidden_layers
        if not 0 <= start_layer < count - 1:
            raise ValueError(
                f"SceneMagnifierConfig: start_layer is {start_layer} of {count} layers; expected 0 to {count - 2}, the "
                "layer after it is the first that magnifies"
            )
        chosen = list(range(start_layer + 1, count)) if layers is None else sorted(set(layers))
        if not chosen or chosen[0] <= start_layer or chosen[-1] >= count:
            raise ValueError(
                f"SceneMagnifierConfig: layers are {chosen}; expected some of {start_layer + 1} to {count - 1}, those "
                "after start_layer"
            )
        if projector not in ("mlp", "linear"):
            raise ValueError(f"SceneMagnifierConfig: projector is {projector!r}; choose 'mlp' or 'linear'")
        select_regions(torch.zeros(1), threshold, max_regions)  # raises for values out of range
        if warm_up != -1 and not warm_up > 0:
            raise ValueError(f"SceneMagnifierConfig: warm_up is {warm_up}; expected a positive rate, or -1 for none")
        self.scene_dim, self.scene_token_id, self.start_layer, self.layers = (
            scene_dim,
            scene_token_id,
            start_layer,
            chosen,
        )
        self.threshold, self.max_regions, self.warm_up, self.projector = threshold, max_regions, warm_up, projector
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The decoder's."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """The decoder's."""
        return self.text_config.hidden_size

    @staticmethod
    def example() -> "SceneMagnifierConfig":
        """A small Llama of three layers with grouped keys."""
        sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        text = AutoConfig.for_model("llama", **sizes, **heads)
        return SceneMagnifierConfig(text, scene_dim=12, scene_token_id=1, start_layer=0)


class _FineProjections(nn.Module):
    """Keys and values of the fine tokens, of one layer."""

    def __init__(self, width: int, kv_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.k_fine = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v_fine = nn.Linear(width, kv_heads * head_dim, bias=bias)

    def forward(self, fine: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor]:
        return split_heads(self.k_fine(fine), self.kv_heads), split_heads(self.v_fine(fine), self.kv_heads)


class _Centers(nn.Module):
    """Random Fourier features of places scaled to the scene's box, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(3, width // 2), requires_grad=False)
        self.project = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, centers: Float[Tensor, "b c 3"], low: Tensor, high: Tensor) -> Float[Tensor, "b c f"]:
        scaled = (centers - low) / (high - low).clamp_min(1e-6)
        angles = 2 * math.pi * scaled @ self.frequencies.to(scaled)
        return self.project(torch.cat([angles.sin(), angles.cos()], -1))


class SceneMagnifier(PreTrainedModel, GenerationMixin):
    """A causal language model with a scene in front of its text, and magnified attention over the scene.

    choose: what selects, `(layer, preference [b r c]) -> bool [b r c]`; None is `select_regions` with the config's
    threshold and max_regions. It is no part of the state.
    """

    config_class = SceneMagnifierConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = False  # a replayed layer would not find its scene

    def __init__(self, config: SceneMagnifierConfig, decoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.decoder: Any = AutoModelForCausalLM.from_config(config.text_config) if decoder is None else decoder
        modules = by_layer(self.decoder)
        if missing := [layer for layer in involved(config.layers) if layer not in modules]:
            raise UnsupportedModel(
                f"SceneMagnifier: layer {missing[0]} of {type(self.decoder).__name__} has no attention; those with it "
                f"are {sorted(modules)}"
            )
        replaced = [m for m in modules.values() if dispatch.mechanism_of(m) is not None]
        other = next((m for m in replaced if dispatch.previous_name(m.config) != NAME), None)
        if other is not None:
            raise UnsupportedModel(
                f"SceneMagnifier: {dispatch.previous_name(other.config)} stands in for the decoder's attention; "
                "magnify a decoder with its own"
            )
        width = config.hidden_size
        self.choose: Callable[[int, Tensor], Tensor] | None = None
        self.step_ratio = 1.0
        if config.projector == "mlp":
            steps = [nn.Linear(config.scene_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            self.project = nn.Sequential(*steps, nn.Linear(width, width))
        else:
            self.project = nn.Linear(config.scene_dim, width)
        self.place = _Centers(config.scene_dim)
        self.magnifiers = nn.ModuleDict()
        for layer in config.layers:
            module = modules[layer]
            shape, bias = attention_shape(module), getattr(getattr(module, "k_proj", None), "bias", None) is not None
            self.magnifiers[str(layer)] = _FineProjections(width, shape.kv_heads, shape.value_dim, bias)
        for layer in config.layers:
            modules[layer].register_forward_pre_hook(note_positions, with_kwargs=True)
        dispatch.use(modules.values(), NAME)
        if decoder is None:
            self.post_init()
        else:
            for part in (self.project, self.place, self.magnifiers):
                part.apply(self._init_weights)

    @classmethod
    def from_decoder(cls, decoder: nn.Module, *, copy_projections: bool = True, **options: Any) -> "SceneMagnifier":
        """Put a magnifier into a language model that is there already; the model itself is used, not a copy.

        options: of the config. copy_projections: fine keys and values start as the layer's own projections of keys and
        values (where it has such), not from random weights.
        """
        given: Any = decoder
        config = SceneMagnifierConfig(copy.deepcopy(given.config), **options)
        model = cls(config, decoder)
        sample = next(decoder.parameters())
        for part in (model.project, model.place, model.magnifiers):
            part.to(device=sample.device, dtype=sample.dtype)
        model.generation_config = copy.deepcopy(given.generation_config)
        modules = by_layer(decoder)
        for layer in config.layers if copy_projections else ():
            for ours, theirs in (("k_fine", "k_proj"), ("v_fine", "v_proj")):
                old, new = getattr(modules[layer], theirs, None), getattr(model.magnifiers[str(layer)], ours)
                if isinstance(old, nn.Linear) and old.weight.shape == new.weight.shape:
                    new.load_state_dict(old.state_dict())
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _Centers):
            nn.init.normal_(module.frequencies)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's."""
        return self.decoder.get_output_embeddings()

    # --- scenes -----------------------------------------------------------------------------------------------------

    def encode_scene(
        self,
        coarse: Float[Tensor, "b c f"],
        fine: Float[Tensor, "a n g"],
        *,
        parent: Int[Tensor, "... p"] | None = None,
        centers: Float[Tensor, "b c 3"] | None = None,
        fine_centers: Float[Tensor, "b n 3"] | None = None,
    ) -> EncodedScene:
        """Everything that every question about a scene needs: one matrix product a layer, then only attention.

        parent: the coarse token of each fine one, `[n]` or `[b n]`; None: equally many each, in order. centers,
        fine_centers: places, whose embedding is added to the features.
        Raises ValueError for no coarse tokens, for a number of fine tokens that no number of regions shares evenly
        (where parent is None), and for parents that are not there.
        """
        b, c, width = coarse.shape
        if c == 0:
            raise ValueError("SceneMagnifier: the scene has no coarse tokens; give at least one")
        if width != self.config.scene_dim or fine.shape[0] != b or fine.shape[2] != width:
            raise ValueError(
                f"SceneMagnifier: coarse has shape {tuple(coarse.shape)} and fine {tuple(fine.shape)}; expected as "
                f"many scenes and {self.config.scene_dim} features in both"
            )
        n = fine.shape[1]
        if parent is None:
            if n % c:
                raise ValueError(
                    f"SceneMagnifier: {n} fine tokens for {c} coarse ones; without a parent index there must be "
                    "equally many for each"
                )
            parent = torch.arange(c, device=coarse.device).repeat_interleave(n // c)
        parent = parent.expand(b, -1)
        if parent.shape[1] != n or (n and not 0 <= int(parent.min()) <= int(parent.max()) < c):
            raise ValueError(
                f"SceneMagnifier: parent has shape {tuple(parent.shape)}; expected a coarse token, 0 to {c - 1}, for "
                f"each of {n} fine ones"
            )
        if centers is not None:
            low, high = centers.amin(1, keepdim=True), centers.amax(1, keepdim=True)
            coarse = coarse + self.place(centers, low, high)
            fine = fine if fine_centers is None else fine + self.place(fine_centers, low, high)
        elif fine_centers is not None:
            raise ValueError("SceneMagnifier: fine_centers without centers; give both, or none")
        features = self.project(fine)
        made = {layer: self.magnifiers[str(layer)](features) for layer in self.config.layers}
        keys, values = ({layer: pair[i] for layer, pair in made.items()} for i in (0, 1))
        return EncodedScene(self.project(coarse), parent, keys, values)

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        coarse: Float[Tensor, "e c f"] | None = None,
        fine: Float[Tensor, "a n g"] | None = None,
        parent: Int[Tensor, "... p"] | None = None,
        centers: Float[Tensor, "e c 3"] | None = None,
        fine_centers: Float[Tensor, "e n 3"] | None = None,
        scene: EncodedScene | None = None,
        question_mask: Bool[Tensor, "b _"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """What the decoder returns for text with a scene in it.

        input_ids: with `scene_token_id` once for each coarse token, in every row. coarse, fine, parent, centers: of
        `encode_scene`; scene: what that returned, instead. Neither: plain text, or text that goes on from a cache with
        a scene. question_mask: the rows that look closer; None is every real token behind the scene.
        Raises ValueError for scene tokens that are not as many as the scene's, hidden, or without a scene.
        """
        if scene is None and (coarse is not None or fine is not None):
            if coarse is None or fine is None:
                raise ValueError("SceneMagnifier: coarse and fine tokens belong together; give both")
            scene = self.encode_scene(coarse, fine, parent=parent, centers=centers, fine_centers=fine_centers)
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        given = {name: value for name, value in given.items() if value is not None} | kwargs
        given["logits_to_keep"] = logits_to_keep
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None:  # under the name that the decoder has for it
            given = {name: x for name, x in given.items() if name not in CACHE_NAMES} | with_cache(self.decoder, cache)
        places = input_ids == self.config.scene_token_id
        if scene is None:
            if bool(places.any()):
                raise ValueError("SceneMagnifier: input_ids hold scene tokens; give coarse and fine, or a scene")
            held = getattr(cache, HELD, None) if past else None
            if held is None:
                return self.decoder(input_ids=input_ids, **given)
            behind = torch.ones_like(places)
            given["input_ids"] = input_ids
        else:
            held, behind = self._placed(scene, places, attention_mask, past)
            embeddings = self.get_input_embeddings()(input_ids)
            given["inputs_embeds"] = embeddings.masked_scatter(places[..., None], scene.coarse.to(embeddings.dtype))
        run = self._run(held, behind, attention_mask, question_mask, past)
        with under_way(run):
            out = self.decoder(**given)
        held.scene = None
        filled = cache_of(out)
        if scene is not None and filled is not None:
            setattr(filled, HELD, held)
        return out

    def _placed(
        self, scene: EncodedScene, places: Bool[Tensor, "b t"], mask: Tensor | None, past: int
    ) -> tuple[Held, Tensor]:
        """A scene where the prompt has its tokens, and the rows behind it."""
        b, c = scene.coarse.shape[:2]
        t = places.shape[1]
        counts = places.sum(1)
        if len(places) != b or not bool((counts == c).all()):
            raise ValueError(
                f"SceneMagnifier: input_ids have {counts.tolist()[:8]} scene tokens in {len(places)} rows; expected "
                f"{c} in each of {b}, one for each coarse token"
            )
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -t:].bool()[places].all()):
            raise ValueError("SceneMagnifier: attention_mask hides scene tokens; a scene has no padding")
        index = torch.arange(t, device=places.device)
        columns = places.nonzero()[:, 1].view(b, c)
        behind = index > columns[:, -1:]
        return Held(columns + past, scene.parent, {}, dict(scene.values), scene), behind

    def _run(self, held: Held, behind: Tensor, mask: Tensor | None, question: Tensor | None, past: int) -> Run:
        if mask is not None and mask.ndim == 2:
            behind = behind & mask[:, -behind.shape[1] :].bool()
        if question is not None:
            if question.shape != behind.shape:
                raise ValueError(
                    f"SceneMagnifier: question_mask has shape {tuple(question.shape)}; expected {tuple(behind.shape)}, "
                    "that of input_ids"
                )
            behind = behind & question
        any_row = behind.any(0)
        first = int(any_row.int().argmax()) if bool(any_row.any()) else behind.shape[1]
        modules = by_layer(self.decoder)
        lost = next((m for m in modules.values() if dispatch.previous_name(m.config) != NAME), None)
        if lost is not None:
            raise ValueError(
                f"SceneMagnifier: the decoder's attention was set to {lost.config._attn_implementation!r}, under which "
                f'nothing is magnified; call model.decoder.set_attn_implementation("{NAME}")'
            )
        layers = {id(modules[layer]): layer for layer in involved(self.config.layers)}
        ramp = self.config.warm_up != -1 and self.training
        alpha = max(0.0, min(1.0, self.config.warm_up * self.step_ratio)) if ramp else 1.0
        magnified = frozenset(self.config.layers)
        choose = self._choose if self.choose is None else self.choose
        return Run(layers, held, behind[:, first:], first, past, magnified, alpha, choose)

    def _choose(self, layer: int, preference: Tensor) -> Tensor:
        return select_regions(preference, self.config.threshold, self.config.max_regions)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A scene is read once; the tokens after it find it in the cache."""
        mixin: Any = super()  # whose methods transformers' types do not know
        inputs = mixin.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
        if cache is not None and not kwargs.get("is_first_iteration", False) and cache.get_seq_length() > 0:
            for name in ("coarse", "fine", "parent", "centers", "fine_centers", "scene", "question_mask"):
                inputs.pop(name, None)
        return inputs
