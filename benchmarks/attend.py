"""Reading and editing the heads of a decoder of 52M parameters (1.1B on a GPU): ratios to its plain forward pass.

Rivals read the same model object: transformers with output_attentions, TransformerLens, nnsight.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks import Benchmark, Variant, setting
from headwise.attend.edits import Ablate, BiasGroup, EditRows, ScaleGroup, ScaleHeads
from headwise.attend.groups import first_token, spans
from headwise.attend.probes import PROBES, make_probe
from headwise.hf.session import probe, steer

LENGTHS = (512, 2048, 8192)
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "layers": 12, "heads": 9, "key_heads": 3}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "layers": 22, "heads": 32, "key_heads": 4}


def sizes() -> dict[str, int]:
    """A GPU would spend its time on a small model's launches alone."""
    return LARGE if setting.device.startswith("cuda") else SMALL


@cache
def model(implementation: str = "sdpa") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = sizes()
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["key_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    config._attn_implementation = implementation
    made: Any = LlamaForCausalLM(config).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


@cache
def ids(n: int) -> torch.Tensor:
    return torch.randint(0, 16384, (1, n), generator=torch.Generator().manual_seed(n)).to(setting.device)


@torch.no_grad()
def forward(n: int, **options) -> Any:
    return model()(ids(n), use_cache=False, logits_to_keep=1, **options)


def plain(n: int) -> Callable[[], Any]:
    return lambda: forward(n)


def probed(n: int, names: list[str], sampled: bool = False) -> Callable[[], Any]:
    def run() -> Any:
        with probe(model(), *(make_probe(name, sampled=sampled) for name in names)):
            return forward(n)

    return run


def steered(n: int, edit: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with steer(model(), edit()):
            return forward(n)

    return run


def materialised(n: int) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return model("eager")(ids(n), use_cache=False, logits_to_keep=1, output_attentions=True).attentions

    return run


def transformer_lens(n: int) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    from headwise.specimens.registry import load_specimen

    # It asks for a tokenizer and never uses it here.
    tokenizer = load_specimen("text").tokenizer
    bridge = TransformerBridge.boot_transformers("llama", hf_model=model("eager"), tokenizer=tokenizer)

    @torch.no_grad()
    def run() -> Any:
        return bridge.run_with_cache(ids(n), names_filter=lambda name: name.endswith("hook_pattern"))

    return run


def nnsight(n: int) -> Callable[[], Any]:
    import nnsight as ns

    wrapped = ns.NNsight(model("eager"))

    @torch.no_grad()
    def run() -> Any:
        kept = []
        with wrapped.trace(ids(n), use_cache=False, logits_to_keep=1, output_attentions=True):
            for layer in wrapped.model.layers:
                kept.append(layer.self_attn.output[1].save())
        return kept

    return run


def _rival(name: str, package: str | None, n: int, make: Callable[[int], Any]) -> Variant:
    """Rivals keep every weight: heads x layers x n^2 floats, twice while a layer is at work."""
    skip = None
    needed = 2 * sizes()["heads"] * sizes()["layers"] * n * n * 4
    if package and importlib.util.find_spec(package) is None:
        skip = f"{package} is not installed (extra: rivals)"
    elif needed > _free() / 2:
        skip = f"needs about {needed / 2**30:.0f} GiB, more than half of what is free"
    elif n > 2048:
        skip = "rivals that keep every weight are run up to 2,048 tokens"
    return Variant(name, partial(make, n), skip)


def _free() -> int:
    if setting.device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def variants(n: int) -> list[Variant]:
    everything = list(PROBES)
    found = [
        Variant("plain", partial(plain, n)),
        Variant("probe sink", partial(probed, n, ["sink"])),
        Variant("probe previous", partial(probed, n, ["previous"])),
        Variant("all probes", partial(probed, n, everything)),
    ]
    if n > 2048:
        found.append(Variant("all probes, sampled rows", partial(probed, n, everything, True)))
    quarter = [(8, 8 + n // 4)]
    edits: dict[str, Callable[[], Any]] = {
        "ablate a head": lambda: Ablate(["3.1"]),
        "scale every head": lambda: ScaleHeads(0.5),
        "uniform head": lambda: Ablate(["3.1"], mode="uniform"),
        "bias first token": lambda: BiasGroup(first_token(), math.log(1.6)),
        "remove first token": lambda: BiasGroup(first_token(), -math.inf),
        "mass of first token": lambda: ScaleGroup(first_token(), 0.5),
        "mass of a quarter of the text": lambda: ScaleGroup(spans(quarter), 0.5),
        "mass of a quarter, a third of the heads": lambda: ScaleGroup(spans(quarter), 0.5, heads="*.0-2"),
        "own function, one head": lambda: EditRows(lambda weights, rows: weights, heads=["3.1"]),
    }
    found += [Variant(f"edit {name}", partial(steered, n, edit)) for name, edit in edits.items()]
    return [
        *found,
        _rival("eager output_attentions", None, n, materialised),
        _rival("TransformerLens run_with_cache", "transformer_lens", n, transformer_lens),
        _rival("nnsight trace", "nnsight", n, nnsight),
    ]


def check() -> None:
    """Probed outputs are the plain ones, and a materialised edit gives what the fused path gives."""
    reference = forward(64).logits
    if not torch.equal(probed(64, list(PROBES))().logits, reference):
        raise RuntimeError("attend: a probe changed the model's output")
    fused = steered(64, lambda: ScaleGroup(first_token(), 0.5))().logits

    def halve(weights, rows):
        first = weights[..., :1]
        rest = (1 - first).clamp_min(1e-30)
        new = torch.cat([first * 0.5, weights[..., 1:] * (1 - first * 0.5) / rest], -1)
        return torch.where(first > 0.9999999, weights, new)

    formed = steered(64, lambda: EditRows(halve))().logits
    error = float((fused.float() - formed.float()).norm() / formed.float().norm())
    if not error < (1e-4 if setting.dtype == "float32" else 0.1):
        raise RuntimeError(f"attend: the fused and the materialised edit are {error:.2g} apart")


def benchmark() -> Benchmark:
    return Benchmark("attend", {str(n): partial(variants, n) for n in LENGTHS}, check)
