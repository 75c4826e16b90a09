"""On a GPU everything gives what it gives on the CPU, where it is held to written-out weights."""

import copy
import json
from typing import Any

import pytest
import torch
from tests.zoo import FAMILIES, families
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, BiasGroup, ForceRows, ScaleGroup
from headwise.attend.groups import positions, recent
from headwise.attend.probes import PROBES
from headwise.cli import run
from headwise.hf.addresses import layout
from headwise.hf.maps import attention_maps
from headwise.hf.session import probe, steer
from headwise.specimens.registry import load_specimen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """Convolutions of vision towers are rounded to ten bits otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pair(name: str) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model and its inputs on the CPU and on the GPU."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, 2, 24 if family.kind == "multimodal" else 13, "left" if family.padded else None)
    return model, copy.deepcopy(model).cuda(), inputs, {key: value.cuda() for key, value in inputs.items()}


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    found = next(value for value in out.values() if isinstance(value, Tensor) and value.ndim > 1)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return found[mask.bool()] if mask is not None and mask.shape == found.shape[:2] else found


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())


def scores(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, dict[Any, Tensor]]:
    probes = [cls(**options) for cls in PROBES.values()]
    with torch.no_grad(), probe(model, *probes):
        model(**inputs)
    return {one.name: {place: value.cpu().double() for place, value in one.scores().items()} for one in probes}


@pytest.mark.parametrize("name", FAMILIES)
def test_probes_and_edits_are_those_of_the_cpu(name):
    on_cpu, on_gpu, inputs, moved = pair(name)
    before = first_output(on_gpu, moved)
    # How far the plain models are apart: weights are so large here that rounding grows from layer to layer.
    plain = apart(before, first_output(on_cpu, inputs))
    assert plain < 5e-3
    bound = max(1e-4, 20 * plain)
    expected, found = scores(on_cpu, inputs), scores(on_gpu, moved)
    for which, places in expected.items():
        for place, value in places.items():
            torch.testing.assert_close(
                found[which][place], value, rtol=bound, atol=bound, equal_nan=True,
                msg=lambda text, at=f"{which} of {place}": f"{at}: {text}",
            )  # fmt: skip
    with steer(on_gpu), probe(on_gpu, *(cls() for cls in PROBES.values())):
        assert torch.equal(first_output(on_gpu, moved), before)
    tower = layout(on_cpu).main
    heads = [Head(layer, h, tower.name) for layer, n in enumerate(tower.heads) if n for h in (0, n - 1)]
    for edit in (
        Ablate(heads),
        BiasGroup(positions([1, 2]), 1.3, heads=heads),
        ScaleGroup(positions([1, 2]), 0.3, heads=heads),
        ForceRows("first", heads=heads),
    ):
        with steer(on_cpu, edit):
            want = first_output(on_cpu, inputs)
        with steer(on_gpu, edit):
            got = first_output(on_gpu, moved)
        error = apart(got, want)
        assert error < bound, f"{type(edit).__name__}: {error}, plain {plain}"


@pytest.mark.parametrize("name", families(kind="decoder"))
def test_generation_under_edits_is_that_of_the_cpu(name):
    on_cpu, on_gpu, inputs, moved = pair(name)
    edits = [ScaleGroup(positions([4, 5]), 0.3, heads="*.0"), BiasGroup(recent(3), 1.0, heads="*.0")]
    made = []
    for model, given in ((on_cpu, inputs), (on_gpu, moved)):
        with steer(model, *edits):
            out = model.generate(
                **given, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        made.append(torch.stack(out.logits, 1).cpu())
    assert apart(made[1], made[0]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, "left"])
def test_half_precision_takes_the_fused_kernels(dtype, padding):
    """Scores of a trained model in half precision are near those in single; padding goes through the other kernel."""
    specimen = load_specimen("text")
    ids = specimen.tokenizer("Anna gave Bert a book. Then Anna gave Clara a book, and Bert gave Anna a pen.")[
        "input_ids"
    ]
    whole = torch.tensor([ids, ids], device="cuda")
    mask = torch.ones_like(whole)
    if padding:
        mask[1, :5] = 0
    inputs = {"input_ids": whole, "attention_mask": mask}
    single = specimen.model.cuda().float()
    expected = scores(single, inputs)
    found = scores(copy.deepcopy(single).to(dtype), inputs)
    for which, places in expected.items():
        for place, value in places.items():
            torch.testing.assert_close(found[which][place], value, rtol=0.05, atol=0.05, equal_nan=True)
    maps = attention_maps(single, inputs, "2.*")
    assert maps.device.type == "cuda" and torch.allclose(maps[0].sum(-1), torch.ones_like(maps[0, ..., 0]), atol=1e-4)


def test_sampled_rows_of_a_long_text():
    model = FAMILIES["llama"].build().cuda()
    ids = torch.randint(8, 64, (1, 4096), device="cuda")
    model.config.max_position_embeddings = 4096
    sampled, every = (scores(model, {"input_ids": ids}, sampled=flag) for flag in (True, False))
    for place, value in every["entropy"].items():
        torch.testing.assert_close(sampled["entropy"][place], value, rtol=0.05, atol=0.02)


def test_commands_run_there(tmp_path, capsys):
    assert run(["scan", "--device", "cuda", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert max(document["probes"]["sink"].values()) > 0.5
    assert run(["steer", "--edit", "zero-tuning:gamma=3", "--prompt", "The old man", "--device", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steered"]
