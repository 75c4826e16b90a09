"""Models inside something else: adapters, quantised projections, weights that lie elsewhere or on several processes."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.hf.parallel import FAMILIES_IN_PARALLEL, WHOLE_ON_EVERY_RANK, results, work
from tests.zoo import FAMILIES
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import headwise as hw
from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, BiasGroup, ScaleGroup
from headwise.attend.groups import first_token, recent
from headwise.attend.probes import PROBES
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules, heads_of, layout, unwrap
from headwise.hf.inputs import as_inputs, frugal, input_device
from headwise.hf.maps import attention_maps, head_outputs
from headwise.hf.projections import attention_shape, head_writes, output_projection, projection_bias
from headwise.hf.session import attach, probe, steer
from headwise.hf.shares import HeadShare, head_share
from headwise.hf.sites import find_sites, record, replace

# Of PEFT, which calls transformers by names that newer releases of it have renamed.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "past_key_values")
]

EDITS = [Ablate(["0.1", "1.2"]), ScaleGroup(first_token(), 0.3, heads="1.*"), BiasGroup(recent(2), 0.7, heads="0.0")]


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def scores(model: Any, inputs: dict[str, Tensor]) -> dict[str, dict[tuple[str, int], Tensor]]:
    """What every probe reads."""
    with torch.no_grad(), probe(model, *(probes := [cls() for cls in PROBES.values()])):
        model(**inputs)
    return {read.name: read.scores() for read in probes}


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@contextmanager
def without_columns(projection: nn.Module, heads: int, number: int):
    """The projection as it would be with the columns of one head at zero, written as its input at zero."""

    def zeroed(_: nn.Module, args: tuple) -> tuple:
        z = args[0].unflatten(-1, (heads, -1)).clone()
        z[..., number, :] = 0
        return (z.flatten(-2), *args[1:])

    handle = projection.register_forward_pre_hook(zeroed)
    try:
        yield
    finally:
        handle.remove()


def contribution(model: Any, inputs: dict[str, Tensor], weight: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """|W_O^h z_h| / |attention output|, written out from `weight(projection)` `[c, h e]`."""
    found = []
    for module in attention_modules(model):
        projection, shape = output_projection(module, model), attention_shape(module)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = projection.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        logits(model, inputs)
        handle.remove()
        (z, mixed), matrix = seen[0], weight(projection).double().unflatten(1, (shape.heads, -1))
        writes = torch.einsum("bthe,che->bthc", z.double().unflatten(-1, (shape.heads, -1)), matrix)
        share = writes.norm(dim=-1) / mixed.double().norm(dim=-1, keepdim=True)
        found.append(share[:, 1:].mean((0, 1)))
    return found


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(name: str, targets: list[str], **options: Any) -> Any:
    """A model with a LoRA adapter that does something."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(FAMILIES[name].build(), peft.LoraConfig(target_modules=targets, **options))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.3)
    return model.eval()


LORA = {
    "llama": (["q_proj", "v_proj", "o_proj"], {}),
    "gpt2": (["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    "gemma2": (["k_proj", "o_proj"], {}),
}


@pytest.mark.parametrize("name", LORA)
def test_adapted_models_are_read_and_edited_as_their_merged_form(name):
    """The same addresses, and the same numbers whether the adapter runs beside the weights or is merged into them."""
    model = adapted(name, LORA[name][0], **LORA[name][1])
    base = model.get_base_model()
    inputs = FAMILIES[name].inputs(base, padding="left")
    assert unwrap(model) is base
    assert layout(model) == layout(base)
    assert [(record.head, record.module) for record in heads_of(model)] == [
        (record.head, record.module) for record in heads_of(base)
    ]
    plain = logits(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), plain, atol=1e-2)
    with steer(model), probe(model, *(cls() for cls in PROBES.values())):
        assert torch.equal(logits(model, inputs), plain)
    beside = scores(model, inputs)
    with steer(model, *EDITS):
        edited = logits(model, inputs)
    model.merge_adapter()
    close(logits(model, inputs), plain, 1e-4)
    merged = scores(model, inputs)
    with steer(model, *EDITS):
        close(logits(model, inputs), edited, 1e-4)
    model.unmerge_adapter()
    apart = model.merge_and_unload()
    assert unwrap(apart) is base
    with steer(apart, *EDITS):
        close(logits(apart, inputs), edited, 1e-4)
    for found in (merged, scores(apart, inputs)):
        close(found, beside, 1e-4)


@pytest.mark.parametrize("name", LORA)
def test_ablation_takes_out_a_heads_columns_of_the_adapter_too(name):
    model = adapted(name, LORA[name][0], **LORA[name][1])
    inputs = FAMILIES[name].inputs(model.get_base_model())
    for module, (_, layer) in attention_modules(model).items():
        shape = attention_shape(module)
        projection: Any = output_projection(module, model)
        assert type(projection).__module__.startswith("peft.")
        part = slice(2 * shape.value_dim, 3 * shape.value_dim)
        base = projection.base_layer.weight if name == "gpt2" else projection.base_layer.weight.T
        down = projection.lora_A["default"].weight.T
        kept = base[part].clone(), down[part].clone()
        adapter = head_writes(projection, shape.heads)[2] - kept[0]
        assert float(adapter.detach().norm()) > float(kept[0].norm())  # most of what it writes, it writes there
        with steer(model, Ablate([Head(layer, 2)])):
            ablated = logits(model, inputs)
        with torch.no_grad():
            base[part], down[part] = 0, 0
            expected = logits(model, inputs)
            assert not head_writes(projection, shape.heads)[2].any()
            base[part], down[part] = kept
        close(ablated, expected)


def test_contribution_counts_the_adapter_without_its_dropout():
    """In training mode the adapter drops inputs; what a head writes is still its whole slice."""
    model = adapted("llama", ["o_proj"], lora_dropout=0.5, lora_alpha=32)
    inputs = FAMILIES["llama"].inputs(model.get_base_model())

    def matrix(projection: Any) -> Tensor:
        return projection.base_layer.weight + projection.get_delta_weight("default")

    expected = contribution(model, inputs, matrix)
    found = scores(model, inputs)["contribution"]
    for (_, layer), module in zip(found, attention_modules(model), strict=True):
        close(found["", layer], expected[layer])
        projection = output_projection(module, model)
        before = head_writes(projection, 4)
        projection.train()
        modes = [part.training for part in projection.modules()]
        assert torch.equal(head_writes(projection, 4), before)
        assert [part.training for part in projection.modules()] == modes
        projection.eval()


def test_sites_of_an_adapted_model():
    model = adapted("llama", ["o_proj", "down_proj"])
    inputs = FAMILIES["llama"].inputs(model.get_base_model())
    sites = find_sites(model)
    assert sites.error < 1e-5
    with record(model, ["heads:1", "projection:1", "mlp:1"]) as seen:
        plain = logits(model, inputs)
    projection: Any = sites.layers[1].projection
    writes = torch.einsum("bthe,hec->btc", seen["heads:1"], head_writes(projection, 4))
    close(writes + projection_bias(projection), seen["projection:1"], 1e-4)
    zero = seen["heads:1"].clone()
    zero[:, :, 3] = 0
    with replace(model, {"heads:1": zero}):
        replaced = logits(model, inputs)
    with steer(model, Ablate(["1.3"])):
        assert torch.equal(logits(model, inputs), replaced) and not torch.equal(replaced, plain)


def test_adapted_models_generate_and_are_scanned():
    model = adapted("llama", ["q_proj", "o_proj"])
    inputs = FAMILIES["llama"].inputs(model.get_base_model(), padding="left")
    assert frugal(model) == {"use_cache": False, "logits_to_keep": 1}
    text = torch.arange(8, 48).view(2, 20)
    found = hw.scan(model, text=text)
    with steer(model, *EDITS):
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.merge_adapter()
    with steer(model, *EDITS):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), made)
    merged = hw.scan(model, text=text)
    assert {"sink", "contribution", "induction-repeat"} <= set(found.probes) == set(merged.probes)
    for name in found.probes:
        close(merged.tensor(name), found.tensor(name), 1e-4)
    model.unmerge_adapter()
    assert not torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), made)


def test_a_wrapper_and_what_it_wraps_are_one_model():
    """Attached through either, an edit acts on calls through both, and both are free again afterwards."""
    model = adapted("llama", ["o_proj"])
    base = model.get_base_model()
    inputs = FAMILIES["llama"].inputs(base)
    plain = logits(model, inputs)
    outer, inner = attach(model, Ablate(["0.0"])), attach(base, Ablate(["1.1"]))
    both = logits(model, inputs)
    assert torch.equal(logits(base, inputs), both)
    outer.remove()
    only = logits(base, inputs)
    inner.remove()
    with steer(base, Ablate(["1.1"])):
        assert torch.equal(logits(model, inputs), only)
    with steer(model, Ablate(["0.0"]), Ablate(["1.1"])):
        assert torch.equal(logits(base, inputs), both) and not torch.equal(both, only)
    assert torch.equal(logits(model, inputs), plain)


def test_a_part_of_a_steered_model_cannot_be_steered_by_itself():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    for one, other in ((model, model.model), (model.model, model)):
        with (
            steer(one, Ablate(["0.0"])),
            pytest.raises(RuntimeError, match="attach everything to the same object"),
            steer(other, Ablate(["1.0"])),
        ):
            pass
        with steer(other, Ablate(["0.0"])):
            edited = logits(model, inputs)
        assert not torch.equal(logits(model, inputs), edited)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_soft_prompts(kind):
    """Virtual tokens: keys in a cache that was never filled by tokens, or embeddings before those of the text."""
    peft = pytest.importorskip("peft")
    config = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    model = peft.get_peft_model(FAMILIES["llama"].build(), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    inputs = FAMILIES["llama"].inputs(model.get_base_model())
    plain = logits(model, inputs)
    reads = [PROBES["entropy"](), PROBES["sink"]()]
    with steer(model), probe(model, *reads):
        assert torch.equal(logits(model, inputs), plain)
    assert all(bool(value.isfinite().all()) for read in reads for value in read.scores().values())
    with steer(model, Ablate(["1.2"])):
        ablated = logits(model, inputs)
    module = list(attention_modules(model))[1]
    with without_columns(output_projection(module, model), 4, 2):
        close(ablated, logits(model, inputs))
    assert not torch.allclose(ablated, plain, atol=1e-3)


# --- quantised weights ----------------------------------------------------------------------------------------------


def dynamic(name: str) -> Any:
    """torch's own int8 modules: weights that are no parameters, inputs quantised as they come."""
    return torch.ao.quantization.quantize_dynamic(FAMILIES[name].build(), {nn.Linear}, dtype=torch.qint8)


def weight_only(name: str, spared: str = "") -> Any:
    """torchao's int8 weights: tensors of another class in modules of the usual one."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is tested in an environment of its own")
    model = FAMILIES[name].build()
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != spared,
    )
    return model


def dequantised(projection: Any) -> Tensor:
    weight: Any = projection.weight() if callable(projection.weight) else projection.weight
    return weight.dequantize()


quantised = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning",
)


@quantised
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("make", [dynamic, weight_only])
def test_quantised_models_are_read_and_edited(make, name):
    """Contributions and ablations are those of the weights as quantisation left them."""
    original, model = FAMILIES[name].build(), make(name)
    inputs = FAMILIES[name].inputs(model)
    assert layout(model) == layout(original)
    plain = logits(model, inputs)
    with steer(model), probe(model, *(cls() for cls in PROBES.values())):
        assert torch.equal(logits(model, inputs), plain)
    found = scores(model, inputs)["contribution"]
    for layer, expected in enumerate(contribution(model, inputs, dequantised)):
        close(found["", layer], expected, 1e-4)
    for module, (_, layer) in attention_modules(model).items():
        projection: Any = output_projection(module, model)
        quantised = dequantised(projection)
        close(head_writes(projection, 4).flatten(0, 1), quantised.T)
        exact = [other for other in attention_modules(original) if attention_modules(original)[other] == ("", layer)]
        assert not torch.equal(quantised, getattr(output_projection(exact[0], original), "weight"))  # noqa: B009
        bias = projection.bias() if callable(projection.bias) else projection.bias
        close(projection_bias(projection), torch.zeros(quantised.shape[0]) if bias is None else bias)
        with steer(model, Ablate([Head(layer, 1)])):
            ablated = logits(model, inputs)
        with without_columns(projection, 4, 1):
            assert torch.equal(logits(model, inputs), ablated)
        assert not torch.equal(ablated, plain)


@quantised
@pytest.mark.parametrize("make", [dynamic, weight_only])
def test_sites_of_quantised_models(make):
    model = make("llama")
    inputs = FAMILIES["llama"].inputs(model)
    sites = find_sites(model)
    assert sites.error < 1e-5
    with record(model, ["heads:0", "projection:0"]) as seen:
        logits(model, inputs)
    zero = seen["heads:0"].clone()
    zero[:, :, 3] = 0
    with replace(model, {"heads:0": zero}):
        replaced = logits(model, inputs)
    with steer(model, Ablate(["0.3"])):
        assert torch.equal(logits(model, inputs), replaced)


def test_checkpoints_quantised_by_transformers(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is tested in an environment of its own")
    from transformers import LlamaForCausalLM, TorchAoConfig

    FAMILIES["llama"].build().save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    inputs = FAMILIES["llama"].inputs(model, padding="left")
    by_hand = weight_only("llama", spared="lm_head")
    close(logits(model, inputs), logits(by_hand, inputs), 1e-4)
    with steer(model, *EDITS), steer(by_hand, *EDITS):
        close(logits(model, inputs), logits(by_hand, inputs), 1e-4)
    close(scores(model, inputs), scores(by_hand, inputs), 1e-4)


# --- weights that lie elsewhere -------------------------------------------------------------------------------------


def mapped(name: str, folder: Any) -> dict[str, Any]:
    """The same model with its weights here, partly on the disk, and all of them fetched layer by layer."""
    accelerate = pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    FAMILIES[name].build().save_pretrained(folder / "whole")
    load = AutoModelForCausalLM.from_pretrained
    leaves = [path for path, part in FAMILIES[name].build().named_modules() if not any(part.children())]
    parts = dict.fromkeys(leaves, "cpu")
    last = {path: "disk" for path in parts if ".1." in path}
    here = torch.device("cpu")
    return {
        "device_map": load(folder / "whole", device_map={"": "cpu"}),
        "partly on disk": accelerate.dispatch_model(
            FAMILIES[name].build(), {**parts, **last}, main_device="cpu", offload_dir=folder / "parts"
        ),
        "in memory": accelerate.cpu_offload(FAMILIES[name].build(), execution_device=here),
        "on disk": accelerate.disk_offload(
            FAMILIES[name].build(), folder / "disk", execution_device=torch.device("cpu")
        ),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_weights_are_fetched_where_a_device_map_put_them(name, tmp_path):
    original = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(original, padding="left")
    plain, read = logits(original, inputs), scores(original, inputs)
    maps, kept = attention_maps(original, inputs), head_outputs(original, inputs).mean()
    with steer(original, *EDITS):
        edited = logits(original, inputs)
    for how, model in mapped(name, tmp_path).items():
        offloaded = [parameter.is_meta for parameter in model.parameters()]
        assert any(offloaded) == (how != "device_map")
        assert input_device(model) == torch.device("cpu")
        assert as_inputs(model, inputs["input_ids"])["input_ids"].device == torch.device("cpu")
        assert layout(model) == layout(original)
        assert torch.equal(logits(model, inputs), plain), how
        close(scores(model, inputs), read)
        close(attention_maps(model, inputs), maps)
        close(head_outputs(model, inputs).mean(), kept)
        with steer(model, *EDITS):
            assert torch.equal(logits(model, inputs), edited), how
        assert find_sites(model).error < 1e-5
        for here, there in zip(attention_modules(model), attention_modules(original), strict=True):
            mine, whole = output_projection(here, model), output_projection(there, original)
            close(head_writes(mine, 4), head_writes(whole, 4))
            close(projection_bias(mine), projection_bias(whole))
        assert [parameter.is_meta for parameter in model.parameters()] == offloaded


@pytest.mark.parametrize("holder", ["LlamaAttention", "LlamaDecoderLayer"])
def test_weights_that_a_module_around_them_fetches_are_read_while_the_model_runs(holder):
    """Outside a run they cannot be had from the projection: a product with them would be numbers without a meaning."""
    accelerate = pytest.importorskip("accelerate")
    original = FAMILIES["llama"].build()
    model = accelerate.cpu_offload(
        FAMILIES["llama"].build(), execution_device=torch.device("cpu"), preload_module_classes=[holder]
    )
    inputs = FAMILIES["llama"].inputs(original)
    close(scores(model, inputs), scores(original, inputs))
    with steer(original, *EDITS):
        edited = logits(original, inputs)
    with steer(model, *EDITS):
        assert torch.equal(logits(model, inputs), edited)
    for read in (lambda projection: head_writes(projection, 4), projection_bias):
        with pytest.raises(UnsupportedModel, match=r"on the meta device.*read it while the model runs"):
            read(output_projection(next(iter(attention_modules(model))), model))


def test_weights_that_were_never_loaded_are_refused():
    model = FAMILIES["llama"].build().to("meta")
    with pytest.raises(UnsupportedModel, match="offloaded by a module around it or never loaded"):
        head_writes(output_projection(next(iter(attention_modules(model))), model), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_layers_on_several_devices(name):
    """The first layer computes on the CPU, the second on the GPU: tokens, masks and weights meet where the layer is."""
    accelerate = pytest.importorskip("accelerate")
    original = FAMILIES[name].build()
    second = heads_of(original)[-1].path.rpartition(".")[0]
    leaves = [path for path, part in original.named_modules() if not any(part.children())]
    places: dict[str, Any] = {path: "cpu" for path in leaves if not path.startswith(f"{second}.")}
    model = accelerate.dispatch_model(FAMILIES[name].build(), {**places, second: 0}, main_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "cuda"}
    inputs = FAMILIES[name].inputs(original, padding="left")
    plain = logits(model, inputs)
    with steer(model), probe(model, *(cls() for cls in PROBES.values())):
        assert torch.equal(logits(model, inputs), plain)
    with steer(model, *EDITS), steer(original, *EDITS):
        close(logits(model, inputs).cpu(), logits(original, inputs), 1e-3)
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False).cpu()
        assert torch.equal(made, original.generate(**inputs, max_new_tokens=4, do_sample=False))
    found, expected = scores(model, inputs), scores(original, inputs)
    for read in expected:
        for place in expected[read]:
            close(found[read][place].cpu(), expected[read][place], 1e-3)
    close(attention_maps(model, inputs).cpu(), attention_maps(original, inputs), 1e-3)
    assert find_sites(model).error < 1e-5
    with record(model, "residual") as seen:
        logits(model, inputs)
    assert seen.stack("residual").shape[0] == 2


# --- heads on several processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> Any:
    """Two gloo processes, each with its share of the heads of every family; what they found is in the folder."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in FAMILIES_IN_PARALLEL:
        FAMILIES[name].build().save_pretrained(folder / name)
    spawn(work, (str(folder), FAMILIES_IN_PARALLEL), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES_IN_PARALLEL)
def test_heads_on_two_processes_are_those_of_one(parallel, name):
    """Edits act on the process that holds their heads; every process reads all heads, as one process would."""
    expected = results(name, FAMILIES[name].build())
    assert expected["untouched"] and expected["proved"]
    changed = [key for key in expected if key.endswith(": logits")]
    assert all(not torch.allclose(expected[key], expected["plain"], atol=1e-3) for key in changed)
    heads = expected["layout"].main.heads[-1]
    for rank in range(2):
        found = torch.load(parallel / f"{name}-{rank}.pt", weights_only=False)
        assert found.pop("held") == (heads if name in WHOLE_ON_EVERY_RANK else heads // 2)
        refused = found.pop("refused", "adapted or quantised and spread over processes")
        assert "adapted or quantised and spread over processes" in refused
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key], f"{key} on rank {rank}")


def same(found: Any, expected: Any, where: str) -> None:
    """Tensors within 1e-5 of their own size, anything else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            same(one, other, where)
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        found, expected = found.detach(), expected.detach()
        size = float(expected.nan_to_num().abs().max().clamp(min=1))
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-5 * size, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    else:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected, where


class _Mesh:
    """A device mesh of three processes, as seen by the second."""

    def size(self) -> int:
        return 3

    def get_local_rank(self) -> int:
        return 1


def test_shares_are_equal_and_contiguous():
    share = HeadShare(_Mesh())
    assert share.applies(4, 12, "Attention") and not share.applies(12, 12, "Attention")
    assert share.numbers(4) == [4, 5, 6, 7]
    whole = torch.arange(24).view(2, 12)
    assert torch.equal(share.own(whole, -1), whole[:, 4:8])
    with pytest.raises(UnsupportedModel, match=r"Attention: this process holds 5 of 14 heads.*among 3"):
        share.applies(5, 14, "Attention")
    assert head_share(next(iter(attention_modules(FAMILIES["llama"].build())))) is None
