"""A decoder that reads a scene in coarse tokens and looks closer where its own attention goes.

    layer l >= S:  select[row] = regions that the row's attention over the coarse keys prefers
    layer l > S:   softmax over [keys | W_k F, W_v F of the regions that layer l - 1 selected]

F are the fine tokens; each stands at its coarse token's position. Any causal language model of transformers that goes
through its attention interface can be the decoder; it keeps its weights, and without a scene it computes what it did.
Only rows of text behind the scene look closer. Pictures work alike: coarse tokens are pooled patches, fine ones patches.

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
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from headwise.attend.kernels import attention_with_lse
from headwise.attention.magnifier import THRESHOLD, fine_attention, region_preference, select_regions, spread_to_fine
from headwise.attention.softmax import split_heads
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout
from headwise.hf.projections import attention_shape

__all__ = ["EncodedScene", "SceneMagnifier", "SceneMagnifierConfig"]

NAME = "headwise-scene-magnifier"
HELD = "_headwise_scene"  # where a cache keeps the scene that it was filled with
REFUSED = ("sliding_window", "s_aux", "position_bias", "cache", "read_index")

_thread = threading.local()  # .runs: forwards that are under way in this thread, the inner one last


class SceneMagnifierConfig(PreTrainedConfig):
    """text_config: of the decoder. scene_dim: width of the scene's features. scene_token_id: the token of the decoder's
    vocabulary that holds the place of a coarse token.

    start_layer: the first layer that selects; the next ones magnify. layers: those that magnify, all after it if None.
    threshold, top_k: of `select_regions`. warm_up: in training the magnified output has the share min(1, warm_up *
    step_ratio), 1 where it is -1; `model.step_ratio` is for the training loop to set. projector: "mlp" (three linear
    layers with ReLU) or "linear".
    """

    model_type = "headwise-scene-magnifier"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012, as transformers declares it

    def __init__(
        self,
        text_config: Any = None,
        scene_dim: int = 768,
        scene_token_id: int = 0,
        start_layer: int = 8,
        layers: Sequence[int] | None = None,
        threshold: float = THRESHOLD,
        top_k: int | None = None,
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
        select_regions(torch.zeros(1), threshold, top_k)  # raises for values out of range
        if warm_up != -1 and not warm_up > 0:
            raise ValueError(f"SceneMagnifierConfig: warm_up is {warm_up}; expected a positive rate, or -1 for none")
        self.scene_dim, self.scene_token_id, self.start_layer, self.layers = (
            scene_dim,
            scene_token_id,
            start_layer,
            chosen,
        )
        self.threshold, self.top_k, self.warm_up, self.projector = threshold, top_k, warm_up, projector
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


@dataclass
class EncodedScene:
    """What of a scene depends on no question: coarse embeddings, fine keys and values of every magnifying layer.

    Keys `[b m n d]` are not rotated yet, since their positions depend on the prompt.
    """

    coarse: Float[Tensor, "b c d"]
    parent: Int[Tensor, "b n"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def take(self, items: Int[Tensor, " k"]) -> "EncodedScene":
        """The scenes with these numbers, as often as they are named: several questions about one scene."""
        return EncodedScene(
            self.coarse[items],
            self.parent[items],
            {layer: x[items] for layer, x in self.keys.items()},
            {layer: x[items] for layer, x in self.values.items()},
        )


@dataclass
class _Held:
    """A scene in its place in a prompt: kept with the cache, so that generated tokens find it. keys are rotated."""

    columns: Int[Tensor, "b c"]
    parent: Int[Tensor, "b n"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    scene: EncodedScene | None = None  # whose keys are still to be rotated, in the forward that reads the prompt


@dataclass
class _Run:
    """One forward. rows: `[b t - first]`, which rows from `first` on are text that may look closer."""

    layers: dict[int, int]  # id of an attention module -> its layer
    held: _Held
    rows: Bool[Tensor, "b r"]
    first: int
    past: int
    magnified: frozenset[int]
    alpha: float
    choose: Callable[[int, Tensor], Tensor]
    positions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    selected: Tensor | None = None  # `[b r c]`, by the layer before


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
    threshold and top_k. It is no part of the state.
    """

    config_class = SceneMagnifierConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = False  # a replayed layer would not find its scene

    def __init__(self, config: SceneMagnifierConfig, decoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.decoder: Any = AutoModelForCausalLM.from_config(config.text_config) if decoder is None else decoder
        modules = _by_layer(self.decoder)
        if missing := [layer for layer in _involved(config.layers) if layer not in modules]:
            raise UnsupportedModel(
                f"SceneMagnifier: layer {missing[0]} of {type(self.decoder).__name__} has no attention; those with it "
                f"are {sorted(modules)}"
            )
        width, self.choose, self.step_ratio = config.hidden_size, None, 1.0
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
            modules[layer].register_forward_pre_hook(_note_positions, with_kwargs=True)
        dispatch.use({id(module.config): module.config for module in modules.values()}.values(), NAME)
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
        modules = _by_layer(decoder)
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
        fine: Float[Tensor, "b n f"],
        *,
        parent: Int[Tensor, "*b n"] | None = None,
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
                f"SceneMagnifier: coarse has shape {tuple(coarse.shape)} and fine {tuple(fine.shape)}; expected as many "
                f"scenes and {self.config.scene_dim} features in both"
            )
        n = fine.shape[1]
        if parent is None:
            if n % c:
                raise ValueError(
                    f"SceneMagnifier: {n} fine tokens for {c} coarse ones; without a parent index there must be equally "
                    "many for each"
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
        coarse: Float[Tensor, "b c f"] | None = None,
        fine: Float[Tensor, "b n f"] | None = None,
        parent: Int[Tensor, "*b n"] | None = None,
        centers: Float[Tensor, "b c 3"] | None = None,
        fine_centers: Float[Tensor, "b n 3"] | None = None,
        scene: EncodedScene | None = None,
        question_mask: Bool[Tensor, "b t"] | None = None,
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
        cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        places = input_ids == self.config.scene_token_id
        if scene is None:
            if bool(places.any()):
                raise ValueError("SceneMagnifier: input_ids hold scene tokens; give coarse and fine tokens, or a scene")
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
        with _under_way(run):
            out = self.decoder(**given)
        held.scene = None
        filled = next((getattr(out, name) for name in ("cache", "past_key_values") if getattr(out, name, None)), None)
        if scene is not None and filled is not None:
            setattr(filled, HELD, held)
        return out

    def _placed(
        self, scene: EncodedScene, places: Bool[Tensor, "b t"], mask: Tensor | None, past: int
    ) -> tuple[_Held, Tensor]:
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
        return _Held(columns + past, scene.parent, {}, dict(scene.values), scene), behind

    def _run(self, held: _Held, behind: Tensor, mask: Tensor | None, question: Tensor | None, past: int) -> _Run:
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
        modules = _by_layer(self.decoder)
        lost = next((m for m in modules.values() if dispatch.previous_name(m.config) != NAME), None)
        if lost is not None:
            raise ValueError(
                f"SceneMagnifier: the decoder's attention was set to {lost.config._attn_implementation!r}, under which "
                f'nothing is magnified; call model.decoder.set_attn_implementation("{NAME}")'
            )
        layers = {id(modules[layer]): layer for layer in _involved(self.config.layers)}
        ramp = self.config.warm_up != -1 and self.training
        alpha = max(0.0, min(1.0, self.config.warm_up * self.step_ratio)) if ramp else 1.0
        magnified = frozenset(self.config.layers)
        choose = self._choose if self.choose is None else self.choose
        return _Run(layers, held, behind[:, first:], first, past, magnified, alpha, choose)

    def _choose(self, layer: int, preference: Tensor) -> Tensor:
        return select_regions(preference, self.config.threshold, self.config.top_k)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A scene is read once; the tokens after it find it in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = next((inputs[name] for name in ("cache", "past_key_values") if inputs.get(name) is not None), None)
        if cache is not None and not kwargs.get("is_first_iteration", False) and cache.get_seq_length() > 0:
            for name in ("coarse", "fine", "parent", "centers", "fine_centers", "scene", "question_mask"):
                inputs.pop(name, None)
        return inputs


def _by_layer(decoder: nn.Module) -> dict[int, Any]:
    main = layout(decoder).main.name
    return {layer: module for module, (tower, layer) in attention_modules(decoder).items() if tower == main}


def _involved(layers: Sequence[int]) -> list[int]:
    """Layers that magnify, and those before them, which select."""
    return sorted({layer - back for layer in layers for back in (0, 1)})


@contextmanager
def _under_way(run: _Run) -> Iterator[None]:
    stack = _thread.__dict__.setdefault("runs", [])
    stack.append(run)
    try:
        yield
    finally:
        stack.pop()


def _running(module: nn.Module) -> tuple[_Run, int] | None:
    """The forward that a module takes part in, and its layer."""
    for run in reversed(getattr(_thread, "runs", [])):
        if id(module) in run.layers:
            return run, run.layers[id(module)]
    return None


def _note_positions(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook: cosines and sines of the rows' positions are given to the module and not to its attention."""
    found = _running(module)
    if found is not None and kwargs.get("position_embeddings") is not None:
        found[0].positions[found[1]] = kwargs["position_embeddings"]


def _rotated(module: Any, run: _Run, layer: int) -> Tensor:
    """Fine keys of a layer at the positions of their coarse tokens; made once for a prompt."""
    held = run.held
    if layer in held.keys:
        return held.keys[layer]
    assert held.scene is not None
    keys = held.scene.keys[layer]
    normed = [name for name, _ in module.named_children() if name in ("k_norm", "k_layernorm", "key_norm")]
    keys = getattr(module, normed[0])(keys) if normed else keys
    if layer in run.positions:
        cos, sin = run.positions[layer]
        rotate = getattr(sys.modules.get(type(module).__module__), "apply_rotary_pos_emb", None)
        if rotate is None or cos.ndim != 3 or cos.shape[-1] != keys.shape[-1]:
            raise UnsupportedModel(
                f"SceneMagnifier: {type(module).__name__} rotates a part of its keys, or in a way of its own; decoders "
                "that rotate whole keys, as Llama does, or none are supported"
            )
        b, n = held.parent.shape
        at = (held.columns - run.past).gather(1, held.parent)[..., None].expand(-1, -1, cos.shape[-1])
        cos, sin = (x.expand(b, -1, -1).gather(1, at) for x in (cos, sin))
        keys = rotate(keys, keys, cos.to(keys.dtype), sin.to(keys.dtype))[1]
    elif getattr(module.config, "rope_parameters", None) is not None:
        raise UnsupportedModel(
            f"SceneMagnifier: {type(module).__name__} does not get its rotary positions from its layer"
        )
    held.keys[layer] = keys
    return keys


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    found = _running(module)
    if found is None:
        base = dispatch.base_function(module)
        return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    run, layer = found
    _refuse(module, dropout, kwargs)
    t = query.shape[2]
    is_causal = kwargs.get("is_causal")
    causal = (
        attention_mask is None
        and t > 1
        and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )
    if causal and key.shape[2] > t:  # an empty static cache: the model attends to its first t columns
        key, value = key[:, :, :t], value[:, :, :t]
    options: dict[str, Any] = {"scale": scaling, "softcap": kwargs.get("softcap")}
    out, lse = attention_with_lse(query, key, value, mask=attention_mask, causal=causal, **options)
    first, b = run.first, len(query)
    if first < t:
        text, text_lse = query[:, :, first:], lse[..., first:]
        if layer in run.magnified and run.selected is not None:
            keys, held = _rotated(module, run, layer), run.held
            select = spread_to_fine(run.selected, held.parent)
            near = fine_attention(
                text, keys, held.values[layer], select, out[:, :, first:], text_lse, alpha=run.alpha, **options
            )
            out = torch.cat([out[:, :, :first], near], 2)
        run.selected = None
        if layer + 1 in run.magnified:
            columns = run.held.columns
            coarse = key.gather(2, columns[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
            mask = attention_mask
            if mask is not None:
                mask = mask.expand(b, -1, t, -1)[:, :, first:]
                mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
            preference = region_preference(text, coarse, text_lse, mask=mask, **options)
            run.selected = run.choose(layer, preference) & run.rows[..., None]
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"SceneMagnifier: attention dropout is {dropout}, which cannot act on merged keys; set attention_dropout of "
            "the decoder's config to 0"
        )
    given = next((name for name in REFUSED if kwargs.get(name) is not None), None)
    if given is not None:
        raise UnsupportedModel(
            f"SceneMagnifier: {type(module).__name__} attends with {given}, under which coarse keys may be out of reach "
            "or weights are no plain softmax; use a decoder with full attention"
        )


def _sees(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Any:
    """For probes and edits: a decoder without a scene is what it was; with one its rows see more than its keys."""
    if _running(module) is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} looks at fine tokens that are not among its keys; probes and edits of weights work "
            "on the decoder without a scene"
        )
    return mask


dispatch.offer(NAME, _attend, sees=_sees, masks=None)
