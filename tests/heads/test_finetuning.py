"""Precise tuning against ordinary fine-tuning: what is frozen stays bit-identical, the chosen trains as it would."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.zoo import FAMILIES
from torch import nn
from torch.utils.data import Dataset

from headwise.attend.addresses import Head
from headwise.errors import InputError, UnsupportedModel
from headwise.heads.finetuning import FineTuning, finetune_only, load_slices
from headwise.hf.addresses import head_writes, layout, output_projection
from headwise.hf.parameter_slices import head_slices

GENERATING = [name for name, one in FAMILIES.items() if one.generates and one.kind == "decoder"]


def batches(count: int, vocabulary: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(8, vocabulary, (4, 10), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def optimiser(name: str, parameters) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def train(model: nn.Module, rule: torch.optim.Optimizer, steps: int = 4, accumulate: int = 2) -> None:
    for start in range(steps):
        rule.zero_grad()
        for ids in batches(steps * accumulate)[start * accumulate : (start + 1) * accumulate]:
            (loss_of(model, ids) / accumulate).backward()
        rule.step()


def masks_by_hand(model: nn.Module, heads: dict[int, list[int]], mlps: list[int]) -> dict[str, torch.Tensor]:
    """For the llama of the zoo: two query heads of eight to a key head; written out here a second time."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for layer, numbers in heads.items():
        base = f"model.layers.{layer}.self_attn."
        for number in numbers:
            masks[base + "q_proj.weight"][8 * number : 8 * number + 8] = True
            masks[base + "o_proj.weight"][:, 8 * number : 8 * number + 8] = True
        for key in range(2):
            if {2 * key, 2 * key + 1} <= set(numbers):
                masks[base + "k_proj.weight"][8 * key : 8 * key + 8] = True
                masks[base + "v_proj.weight"][8 * key : 8 * key + 8] = True
    for name in masks:
        if any(name.startswith(f"model.layers.{layer}.mlp.") for layer in mlps):
            masks[name][:] = True
    return masks


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_the_frozen_rest_is_bit_identical_and_the_chosen_entries_train_as_in_masked_full_tuning(rule):
    start = FAMILIES["llama"].build()
    precise, masked = copy.deepcopy(start), copy.deepcopy(start)
    tuning = finetune_only(precise, heads=["0.1", "1.2", "1.3"], mlps=[1])
    train(precise, optimiser(rule, tuning.parameters()))
    tuning.merge()
    masks = masks_by_hand(start, {0: [1], 1: [2, 3]}, [1])
    step_rule = optimiser(rule, masked.parameters())
    for group in step_rule.param_groups:
        group["foreach"] = False
    # The definition: an ordinary step on everything, then everything outside the mask put back.
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    original_step = step_rule.step

    def step() -> None:
        original_step()
        with torch.no_grad():
            for name, p in masked.named_parameters():
                p.copy_(torch.where(masks[name], p, before[name]))

    step_rule.step = step  # type: ignore[method-assign]
    train(masked, step_rule)
    changed = 0
    for name, parameter in precise.named_parameters():
        kept = parameter[~masks[name]]
        assert torch.equal(kept.view(torch.int32), before[name][~masks[name]].view(torch.int32)), name
        assert torch.equal(parameter[masks[name]], masked.get_parameter(name)[masks[name]]), name
        changed += int((parameter != before[name]).sum())
    assert changed > 0.9 * sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_everything_chosen_is_ordinary_fine_tuning_bit_for_bit(name):
    precise, ordinary = FAMILIES[name].build(), FAMILIES[name].build()
    tuning = finetune_only(precise, heads=None, mlps="all", embeddings="both", also=["*"])
    assert tuning.share == 1 and tuning.entries == sum(p.numel() for p in ordinary.parameters())
    train(precise, optimiser("adamw", tuning.parameters()))
    train(ordinary, optimiser("adamw", ordinary.parameters()))
    tuning.merge()
    for key, parameter in ordinary.named_parameters():
        assert torch.equal(parameter, precise.get_parameter(key)), key


@pytest.mark.parametrize("name", GENERATING)
def test_gradients_of_slices_are_those_of_full_fine_tuning(name):
    """Of one head in every layer, in every family: separate, fused, interleaved, grouped and latent projections."""
    model = FAMILIES[name].build()
    ids = batches(1)[0]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    loss_of(model, ids).backward()
    full = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chosen = [Head(layer, 1) for layer, heads in enumerate(layout(model).main.heads) if heads]
    tuning = finetune_only(model, heads=chosen, shared="train")
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    loss_of(model, ids).backward()
    found = head_slices(copy.deepcopy(tuning.unload()), {head.layer for head in chosen})
    slices = {}
    tuning = finetune_only(model, heads=chosen, shared="train")
    loss_of(model, ids).backward()
    for key, parameter in tuning.named_parameters():
        slices[key.removesuffix("_slice")] = parameter.grad
    covered = {one.name for (head, _), parts in found.slices.items() if head in chosen for one in parts}
    assert set(slices) == covered
    for key, state in tuning.state_dict().items():
        if key.endswith(".index"):
            base, axis = key.removesuffix(".index").split("@")
            torch.testing.assert_close(slices[base], full[base].index_select(int(axis), state), rtol=0, atol=0)
    tuning.unload()


@pytest.mark.parametrize("name", [name for name, one in FAMILIES.items() if one.padded])
def test_slices_of_different_heads_cover_the_projections_and_no_more(name):
    """A head's slices are its own: changed, they change the attention of that head (and of its group) alone."""
    model = FAMILIES[name].build()
    tower = layout(model).main
    found = head_slices(model, range(tower.layers), tower=tower.name)
    for layer, (heads, keys) in enumerate(zip(tower.heads, tower.kv_heads, strict=True)):
        for part, owners in (("q", heads), ("k", keys), ("v", keys), ("o", heads)):
            if not heads:
                continue
            each = [found.slices[Head(layer, number, tower.name), part] for number in range(heads)]
            sets = [{(one.name, place) for one in parts for place in one.index} for parts in each]
            own = [frozenset(one) for one in sets]
            assert len(set(own)) == owners, (layer, part)
            assert len({len(one) for one in sets}) == 1


def test_only_the_chosen_head_changes():
    model = FAMILIES["gpt2"].build()
    before = copy.deepcopy(model)
    tuning = finetune_only(model, heads="1.2", parts="o")
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.mul_(3)
    writes = head_writes(output_projection(model.transformer.h[1].attn), 4)  # read while it is being tuned
    old = head_writes(output_projection(before.transformer.h[1].attn), 4)
    torch.testing.assert_close(writes[2], 3 * old[2])
    assert torch.equal(writes[[0, 1, 3]], old[[0, 1, 3]])
    tuning.unload()


def test_grouped_slices_are_left_or_trained():
    model = FAMILIES["llama"].build()
    with finetune_only(model, heads="0.0") as left:
        assert not any("k_proj" in name or "v_proj" in name for name, _ in left.named_parameters())
        assert left.entries == 2 * 8 * 32
    with finetune_only(model, heads="0.0", shared="train") as trained:
        assert trained.entries == 4 * 8 * 32  # q, k, v and o
    with finetune_only(model, heads="0.0, 0.1") as both:
        assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in both.named_parameters()} == {
            "q_proj", "k_proj", "v_proj", "o_proj",
        }  # fmt: skip


class Sentences(Dataset):
    def __init__(self, count: int = 16):
        self.ids = torch.cat(batches(count // 4))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model: nn.Module, out: Path, **options):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    given = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "weight_decay": 0.1, "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 3, "disable_tqdm": True,
        "logging_strategy": "no", **options,
    }  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(output_dir=str(out), **given), train_dataset=Sentences())


def test_trainer_keeps_the_frozen_rest_under_decay_and_accumulation(tmp_path):
    model = FAMILIES["gpt2"].build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with finetune_only(model, heads="0.1, 1.3") as tuning:
        state_numbers = 0
        run = trainer(model, tmp_path)
        run.train()
        rule: Any = run.optimizer
        for state in rule.state.values():
            state_numbers += state["exp_avg"].numel()
        assert state_numbers == tuning.entries < 0.1 * sum(p.numel() for p in model.parameters())
        index = {key: value for key, value in tuning.state_dict().items() if key.endswith(".index")}
    moved = 0
    for name, parameter in model.named_parameters():
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        for key, places in index.items():
            base, axis = key.removesuffix(".index").split("@")
            if base == name:
                mask.index_fill_(int(axis), places, True)
        assert torch.equal(parameter[~mask], before[name][~mask]), name
        moved += int((parameter != before[name])[mask].sum())
    assert moved > 0.9 * tuning_entries(index, before)


def tuning_entries(index, before) -> int:
    total = 0
    for key, places in index.items():
        base, axis = key.removesuffix(".index").split("@")
        total += before[base].numel() // before[base].shape[int(axis)] * len(places)
    return total


def test_trainer_with_everything_chosen_equals_the_trainer_without(tmp_path):
    precise, ordinary = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    with finetune_only(precise, heads=None, mlps="all", embeddings="both", also="*norm*"):
        trainer(precise, tmp_path / "a").train()
    trainer(ordinary, tmp_path / "b").train()
    for key, parameter in ordinary.named_parameters():
        assert torch.equal(parameter, precise.get_parameter(key)), key


def test_a_checkpoint_of_the_trainer_is_an_ordinary_model_and_training_resumes_from_it(tmp_path):
    family = FAMILIES["llama"]
    once = family.build()
    with finetune_only(once, heads="0.1, 1.2", mlps=[0]):
        trainer(once, tmp_path / "once").train()
    first = family.build()
    with finetune_only(first, heads="0.1, 1.2", mlps=[0]):
        run = trainer(first, tmp_path / "two", save_strategy="steps", save_steps=2)
        run.train()
    saved = type(first).from_pretrained(tmp_path / "two" / "checkpoint-4")
    for key, parameter in saved.named_parameters():
        assert torch.equal(parameter, once.get_parameter(key)), key
    resumed = family.build()
    with finetune_only(resumed, heads="0.1, 1.2", mlps=[0]):
        trainer(resumed, tmp_path / "two", save_strategy="steps", save_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2")
        )
    for key, parameter in once.named_parameters():
        torch.testing.assert_close(parameter, resumed.get_parameter(key), rtol=0, atol=0, msg=key)


def test_state_saves_and_loads_only_what_changed(tmp_path):
    start = FAMILIES["gpt2"].build()
    model = copy.deepcopy(start)
    tuning = finetune_only(model, heads="0.1, 1.3", mlps=[1])
    train(model, optimiser("adamw", tuning.parameters()))
    tuning.save(tmp_path / "slices.safetensors")
    ids = batches(1)[0]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        tuning.merge()
        assert torch.equal(model(input_ids=ids).logits, wanted)
        other = copy.deepcopy(start)
        assert not torch.allclose(other(input_ids=ids).logits, wanted)
        load_slices(other, tmp_path / "slices.safetensors")
        assert torch.equal(other(input_ids=ids).logits, wanted)
    numbers = sum(v.numel() for k, v in load_file(tmp_path / "slices.safetensors").items() if not k.endswith(".index"))
    assert numbers == tuning_of(start).entries
    with pytest.raises(InputError, match="no part of this GPT2LMHeadModel"):
        load_slices(other, {"transformer.h.7.attn.c_attn.weight@1": torch.zeros(1)})
    with pytest.raises(InputError, match=r"has shape \(2,\); expected \(32,\)"):
        load_slices(other, {"transformer.ln_f.weight": torch.zeros(2)})


def tuning_of(model: nn.Module) -> FineTuning:
    return finetune_only(copy.deepcopy(model), heads="0.1, 1.3", mlps=[1])


def test_unload_takes_everything_back_and_so_does_an_exception():
    start = FAMILIES["llama"].build()
    start.model.norm.weight.requires_grad_(False)
    model = copy.deepcopy(start)
    names = list(model.state_dict())

    class Stop(Exception):
        pass

    with pytest.raises(Stop), finetune_only(model, heads="0.1", mlps=[0], embeddings="both") as tuning:
        train(model, optimiser("adamw", tuning.parameters()))
        assert list(model.state_dict()) == names
        raise Stop
    for key, parameter in start.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key)), key
        assert parameter.requires_grad == model.get_parameter(key).requires_grad
    assert list(model.state_dict()) == names and {type(m) for m in model.modules()} == {
        type(m) for m in start.modules()
    }
    with pytest.raises(RuntimeError, match="merged or unloaded already"):
        tuning.merge()


def test_float32_slices_keep_steps_that_bfloat16_would_round_away():
    ids = batches(1)[0]
    for dtype, moves in ((torch.float32, True), (None, False)):
        model = FAMILIES["llama"].build().to(torch.bfloat16)
        tuning = finetune_only(model, heads="0.0", parts="q", dtype=dtype)
        (parameter,) = tuning.parameters()
        before = parameter.detach().clone()
        rule = torch.optim.SGD([parameter], lr=1e-6)
        loss_of(model, ids).backward()
        rule.step()
        assert torch.equal(parameter, before) != moves
        assert all(p.dtype == torch.bfloat16 for p in tuning.merge().parameters())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"heads": "2.0"}, ValueError, r"layer 2 is out of range"),
        ({"heads": [Head(0, 9)]}, ValueError, r"head 9 is out of range"),
        ({"mlps": [5]}, ValueError, r"mlps has 5; layers with an MLP are 0 to 1"),
        ({"mlps": "most"}, ValueError, r"mlps is 'most'; expected layers such as \[9, 10\], or 'all'"),
        ({}, ValueError, r"nothing is left to train; give heads= or mlps="),
        (
            {"heads": "0.0", "parts": "kv"},
            ValueError,
            r"nothing is left to train; every slice of these heads is shared",
        ),
        ({"heads": "0.0", "parts": "qx"}, ValueError, r"parts is 'qx'; expected letters of 'qkvo', each once"),
        ({"heads": "0.0", "shared": "split"}, ValueError, r"shared is 'split'; expected 'leave' or 'train'"),
        ({"embeddings": "middle"}, ValueError, r"embeddings is 'middle'"),
        ({"also": ["*bias*"]}, ValueError, r"also has '\*bias\*', which names no parameter of the model"),
    ],
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        finetune_only(FAMILIES["llama"].build(), **given)


def test_tied_embeddings_are_trained_at_both_ends_or_not_at_all():
    model = FAMILIES["gpt2"].build()
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(ValueError, match=r"embeddings is 'input', but .* are one tied tensor"):
        finetune_only(model, embeddings="input")
    with finetune_only(model, embeddings="both") as tuning:
        assert tuning.entries == model.lm_head.weight.numel()


def test_tied_mlps_are_refused():
    model = FAMILIES["gpt2"].build()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(ValueError, match=r"is one tensor with .*h\.1\.mlp\.c_fc\.weight"):
        finetune_only(model, mlps=[0])


def test_quantised_and_adapted_projections_are_refused():
    model = FAMILIES["llama"].build()

    class Int8Linear(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj.__class__ = Int8Linear
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj: Int8Linear .* without quantisation"):
        finetune_only(model, heads="0.0")
    finetune_only(model, heads="1.0").unload()  # another layer is fine


def test_a_second_fine_tuning_waits_for_the_first():
    model = FAMILIES["llama"].build()
    with finetune_only(model, heads="0.0") as tuning:
        assert "0.0" in repr(tuning) and f"{tuning.entries:,} entries" in repr(tuning)
        with pytest.raises(RuntimeError, match="has slices in training"):
            finetune_only(model, heads="0.1")
    finetune_only(model, heads="0.1").unload()
