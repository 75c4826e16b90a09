"""Sessions on models: implementations come back, configs are shared, threads and exceptions leave nothing behind."""

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from tests.zoo import FAMILIES, OFF_INTERFACE
from torch import Tensor

from headwise.attend.edits import Ablate, ScaleHeads
from headwise.attend.probes import PROBES
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules
from headwise.hf.session import attach, probe, steer


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "llava"])
def test_every_previous_implementation_is_kept(name, implementation):
    family = FAMILIES[name]
    model = family.build()
    model.set_attn_implementation(implementation)
    inputs = family.inputs(model, 2, 24, "left")
    plain = logits(model, inputs)
    with steer(model):
        assert torch.equal(logits(model, inputs), plain)
    with steer(model, ScaleHeads(0.0)):
        assert not torch.equal(logits(model, inputs), plain)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, inputs), plain)


def test_towers_with_different_implementations_get_their_own_back():
    model = FAMILIES["llava"].build()
    model.set_attn_implementation({"vision_config": "eager"})
    inputs = FAMILIES["llava"].inputs(model, 2, 24)
    plain = logits(model, inputs)
    with steer(model):
        assert torch.equal(logits(model, inputs), plain)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_two_models_that_share_a_config_in_any_order_of_leaving():
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    one, two = (hf.LlamaForCausalLM(config).eval() for _ in range(2))
    inputs = {"input_ids": torch.arange(8, 20)[None]}
    plain = logits(one, inputs), logits(two, inputs)
    first = attach(one, Ablate(["0.*"]))
    assert torch.equal(logits(two, inputs), plain[1])
    second = attach(two, Ablate(["1.*"]))
    edited = logits(two, inputs)
    first.remove()
    assert torch.equal(logits(one, inputs), plain[0])
    assert torch.equal(logits(two, inputs), edited) and not torch.equal(edited, plain[1])
    second.remove()
    assert torch.equal(logits(two, inputs), plain[1])
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "vit", "llava"])
def test_everything_is_undone_after_an_exception_inside_the_forward(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, 2, 24)
    with torch.no_grad():
        plain = model(**inputs)[0]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = next(iter(attention_modules(model))).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="mine"), steer(model, Ablate(None)), probe(model, PROBES["sink"]()):
        model(**inputs)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], plain)
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks


def test_nested_blocks_and_handles_leave_in_any_order():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    plain = logits(model, inputs)
    outer, inner = attach(model, Ablate(["0.0"])), attach(model, Ablate(["1.1"]))
    both = logits(model, inputs)
    with steer(model, Ablate(["0.0"]), Ablate(["1.1"])):
        torch.testing.assert_close(logits(model, inputs), both)
    outer.remove()
    only = logits(model, inputs)
    inner.remove()
    inner.remove()
    with steer(model, Ablate(["1.1"])):
        assert torch.equal(logits(model, inputs), only)
    assert torch.equal(logits(model, inputs), plain)


def test_an_implementation_set_meanwhile_is_left_and_said():
    model = FAMILIES["llama"].build()
    handle = attach(model, Ablate(["0.0"]))
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="was set to 'eager' while headwise was active"):
        handle.remove()
    assert model.config._attn_implementation == "eager"


def test_edits_of_two_threads_on_one_model_are_refused():
    model = FAMILIES["llama"].build()
    errors: list[Exception] = []

    def other() -> None:
        try:
            with steer(model, Ablate(["1.0"])):
                pass
        except RuntimeError as error:
            errors.append(error)

    with steer(model, Ablate(["0.0"])):
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
    assert "from another thread" in str(errors[0])


def test_models_in_threads_of_their_own_do_not_disturb_each_other():
    models = [FAMILIES[name].build(seed) for seed, name in enumerate(["llama", "llama", "gpt2", "gemma2"])]
    inputs = [FAMILIES[name].inputs(models[i]) for i, name in enumerate(["llama", "llama", "gpt2", "gemma2"])]
    expected = []
    for model, given in zip(models, inputs, strict=True):
        with steer(model, Ablate(["0.1"])):
            expected.append(logits(model, given))
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(8):
            with steer(models[index], Ablate(["0.1"])):
                if not torch.equal(logits(models[index], inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", OFF_INTERFACE)
def test_models_off_the_interface_cannot_be_steered(name):
    """transformers itself only logs a warning and changes nothing."""
    with pytest.raises(UnsupportedModel), steer(OFF_INTERFACE[name](), Ablate(["0.0"])):
        pass


def test_checkpoints_and_copies_do_not_carry_headwise(tmp_path):
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    plain = logits(model, inputs)
    with steer(model, Ablate(["0.0"])):
        model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(loaded, inputs), plain)
    copied = copy.deepcopy(model)
    with steer(model, Ablate(["0.0"])):
        torch.testing.assert_close(logits(copied, inputs), plain)


def test_a_model_may_be_loaded_with_the_implementation_by_name(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    plain = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    named = hf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="headwise")
    inputs = FAMILIES["llama"].inputs(plain, padding="left")
    torch.testing.assert_close(logits(named, inputs), logits(plain, inputs))
    with steer(named, Ablate(["0.*"])), steer(plain, Ablate(["0.*"])):
        torch.testing.assert_close(logits(named, inputs), logits(plain, inputs))


def test_a_dropped_model_does_not_leak():
    model = FAMILIES["llama"].build()
    with steer(model, Ablate(["0.0"])), probe(model, PROBES["sink"]()):
        logits(model, FAMILIES["llama"].inputs(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
