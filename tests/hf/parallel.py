"""What is read and edited on a model, as one dictionary of tensors; and the same on each of two processes.

Here and not in the test, since the processes import it by name.
"""

import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo import FAMILIES
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edits import (
    Ablate,
    BiasGroup,
    EditRows,
    ForceRows,
    PerturbScores,
    ProjectHead,
    ReplaceHeads,
    ScaleGroup,
    ScaleHeads,
)
from headwise.attend.groups import first_token, recent
from headwise.attend.probes import PROBES, HeadOutputs
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules, layout
from headwise.hf.maps import attention_maps
from headwise.hf.projections import head_writes, output_projection, projection_bias
from headwise.hf.session import probe, steer
from headwise.hf.sites import find_sites, record, replace

# gpt_oss: transformers' own plan spreads nothing of its attention, this one its heads and their sinks too.
SINKS = "model.layers.*.self_attn"
PLANS: dict[str, Any] = {
    "gpt_oss": {f"{SINKS}.{name}_proj": "colwise" for name in "qkv"}
    | {f"{SINKS}.o_proj": "rowwise", f"{SINKS}.sinks": "colwise", SINKS: "local_params"}
}
FAMILIES_IN_PARALLEL = ("llama", "gemma2", "qwen3", "phi3", "gpt_neox", "gpt_oss", "qwen3_next", "deepseek_v3")
WHOLE_ON_EVERY_RANK = ("phi3", "deepseek_v3")


def edits(heads: int, width: int) -> dict[str, list[Any]]:
    """Edits of every kind; those of one head act on one of two processes only, each process having one such."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, 3, generator=generator))[0]
    table = torch.rand(4, heads, generator=generator)
    value = torch.randn(8, generator=generator)
    return {
        "first share": [Ablate(["*.0"])],
        "second share": [Ablate([f"*.{heads - 1}"])],
        "all": [ScaleHeads(table), Ablate(["*.1"], mode="uniform")],
        "replaced": [ReplaceHeads({Head(3, heads - 1): value, Head(3, 0): lambda z: -z})],
        "groups": [ScaleGroup(first_token(), 0.3, heads=f"*.0,*.{heads - 1}"), BiasGroup(recent(2), table)],
        "rows": [ForceRows(heads="*.1"), PerturbScores(torch.randn(1, heads, 1, 12, generator=generator))],
        "own": [EditRows(lambda weights, rows: weights.roll(1, -1) * rows.visible, heads=f"*.{heads - 1}")],
        "keys": [ProjectHead("k", basis, heads=f"*.0,*.{heads - 1}")],
    }


def results(name: str, model: Any) -> dict[str, Any]:
    """Everything that headwise does with a model, from its logits to its sites."""
    family = FAMILIES[name]
    inputs = family.inputs(model, padding="left")
    found: dict[str, Any] = {"layout": layout(model)}

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    found["plain"] = run()
    main = layout(model).main
    with steer(model), probe(model, *(cls() for cls in PROBES.values()), HeadOutputs()):
        found["untouched"] = torch.equal(run(), found["plain"])
    layers = [layer for layer, heads in enumerate(main.heads) if heads]
    last, heads = layers[-1], main.heads[layers[-1]]
    width = 12 if name == "deepseek_v3" else 8  # of queries and keys
    for kind, chosen in edits(heads, width).items():
        for edit in chosen:
            if isinstance(edit, ReplaceHeads):  # of the last layer with attention
                values: Any = {Head(last, head.head): value for head, value in edit.values.items()}
                size = head_writes(output_projection(list(attention_modules(model))[-1], model), heads).shape[1]
                values = {head: v.repeat(4)[:size] if isinstance(v, Tensor) else v for head, v in values.items()}
                edit.values, edit.heads = values, list(values)
        reads = [cls() for cls in PROBES.values()]
        early = PROBES["entropy"](before_edits=True)
        with steer(model, *chosen), probe(model, *reads, early):
            found[f"{kind}: logits"] = run()
        found[f"{kind}: scores"] = {read.name: read.scores() for read in reads}
        found[f"{kind}: scores before"] = early.scores()
    reads, kept = [cls() for cls in PROBES.values()], HeadOutputs()
    with probe(model, *reads, kept):
        run()
    found["scores"] = {read.name: read.scores() for read in reads}
    found["outputs"] = kept.mean()
    found["maps"] = attention_maps(model, inputs)
    with torch.no_grad():
        found["writes"] = [
            (head_writes(projection, heads), projection_bias(projection))
            for projection in (output_projection(module, model) for module in attention_modules(model))
        ]
        with steer(model, BiasGroup(first_token(), 1.0), BiasGroup(recent(2), 0.5, heads=f"*.{heads - 1}")):
            made = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    found["generated"], found["generated logits"] = made.sequences, torch.stack(made.logits)
    if name in ("llama", "gemma2"):
        found["gradient"] = gradient(model, inputs)
    sites = find_sites(model)
    wanted = [f"residual:{last}", f"heads:{last}", f"projection:{last}", f"mlp:{last}", "final", "logits"]
    with record(model, wanted) as seen:
        run()
    found["sites"] = {name: seen[name] for name in wanted}
    halved = seen[f"heads:{last}"].clone()
    halved[:, :, [0, heads - 1]] *= 0.5
    with replace(model, {f"heads:{last}": halved, f"mlp:{last}": 0.0}):
        found["put"] = run()
    found["proved"] = sites.error < 1e-5
    return found


def gradient(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of a function of read weights in the embeddings that they come from, through edits."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with steer(model, BiasGroup(first_token(), 1.0, heads="0.*")):
        maps = attention_maps(model, given, "1.*", differentiable=True)
    weight = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    (maps * weight).sum().backward()
    assert embeds.grad is not None
    return embeds.grad


def work(rank: int, folder: str, names: tuple[str, ...]) -> None:
    """One of two processes: load each model as transformers shards it, and write down what comes out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    from transformers.distributed.configuration_utils import DistributedConfig

    for name in names:
        plan = PLANS.get(name)
        config = DistributedConfig(tp_size=2) if plan is None else DistributedConfig(tp_size=2, tp_plan=plan)
        cls = type(FAMILIES[name].build())
        model: Any = cls.from_pretrained(Path(folder) / name, distributed_config=config).eval()
        model.generation_config = FAMILIES[name].build().generation_config
        found = results(name, model)
        found["held"] = _held(model, name)
        if name == "llama":
            found["refused"] = _refusal_with_an_adapter(model)
        torch.save(found, Path(folder) / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _held(model: Any, name: str) -> int:
    """How many query heads this process computes in a layer."""
    seen: list[int] = []
    module = next(iter(attention_modules(model)))
    projection: Any = output_projection(module, model)
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    with torch.no_grad():
        model(**FAMILIES[name].inputs(model))
    handle.remove()
    return seen[0] * layout(model).main.heads[-1] // projection.in_features


def _refusal_with_an_adapter(model: Any) -> str:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(UnsupportedModel) as refused, steer(adapted, Ablate(["0.0"])):
        pass
    return str(refused.value)
