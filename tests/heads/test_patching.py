"""Patching against hooks written by hand, the identities of the method, and planted heads."""

import json
from typing import Any

import pytest
import torch
import transformers as hf
from tests.zoo import FAMILIES

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate
from headwise.errors import InputError, UnsupportedModel
from headwise.heads.circuits import faithfulness
from headwise.heads.effects import (
    NodeEffects,
    Receiver,
    centred_logit,
    log_probability,
    logit_difference,
    probability,
)
from headwise.heads.patching import activation_patch, attribution_patch, path_patch
from headwise.hf.addresses import layout
from headwise.hf.maps import head_outputs
from headwise.hf.session import steer
from headwise.hf.sites import record

V, B, T = 50, 3, 9
RIGHT, WRONG = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
D = logit_difference(RIGHT, WRONG)


def gpt2(**options):
    config: dict[str, Any] = {
        "vocab_size": V,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    config |= {"bos_token_id": 1, "eos_token_id": 2, **options}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**config)).eval()


def llama(**options):
    config: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config | options)).eval()


MODELS = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def pair():
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    twin = ids.clone()
    twin[:, 3] = (ids[:, 3] + 5) % V
    return ids, twin


class ByHand:
    """Hooks on the modules of GPT-2 and Llama, written without headwise: what the functions must agree with."""

    def __init__(self, model):
        self.model = model
        self.is_gpt2 = hasattr(model, "transformer")
        self.layers = model.transformer.h if self.is_gpt2 else model.model.layers
        self.heads = model.config.num_attention_heads
        self.keys = getattr(model.config, "num_key_value_heads", self.heads)
        self.width = model.config.hidden_size // self.heads

    def mixing(self, layer):
        return self.layers[layer].attn.c_proj if self.is_gpt2 else self.layers[layer].self_attn.o_proj

    def projections(self, layer, part):
        """The module whose output holds q, k or v, and the columns of one head in it."""
        if self.is_gpt2:
            start = "qkv".index(part) * self.heads * self.width
            return self.layers[layer].attn.c_attn, start
        return getattr(self.layers[layer].self_attn, f"{part}_proj"), 0

    @torch.no_grad()
    def run(self, ids, put_heads=None, put_mlps=None, put_parts=None):
        """Logits of the last token and all that passed. put_heads: layer -> function of z [b t h e]; and so on."""
        seen, handles = {"z": {}, "mlp": {}, "part": {}}, []
        for layer, block in enumerate(self.layers):

            def before(module, args, layer=layer):
                z = args[0].unflatten(-1, (self.heads, -1))
                z = put_heads(layer, z) if put_heads else z
                seen["z"][layer] = z
                return (z.flatten(-2), *args[1:])

            def fed(module, args, out, layer=layer):
                out = put_mlps(layer, out) if put_mlps else out
                seen["mlp"][layer] = out
                return out

            handles.append(self.mixing(layer).register_forward_pre_hook(before))
            handles.append(block.mlp.register_forward_hook(fed))
            for part in "qkv":
                module, start = self.projections(layer, part)

                def projected(module, args, out, layer=layer, part=part, start=start):
                    seen["part"][layer, part] = out
                    return put_parts(layer, part, start, out) if put_parts else out

                handles.append(module.register_forward_hook(projected))
        try:
            logits = self.model(ids).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[:, -1], seen

    def path(self, ids, twin, sender, receivers=(), columns=slice(-1, None), freeze_mlps=False):
        """Metric after patching one path; receivers: (layer, head, part)."""
        _, clean = self.run(ids)
        _, other = self.run(twin)

        def freeze(layer, z):
            z = clean["z"][layer].clone()
            if layer == sender.layer:
                z[:, columns, sender.head] = other["z"][layer][:, columns, sender.head]
            return z

        def frozen(layer, out):
            return clean["mlp"][layer] if freeze_mlps else out

        logits, seen = self.run(ids, freeze, frozen)
        if not receivers:
            return D(logits)

        def receive(layer, part, start, out):
            out = out.clone()
            for at, head, wanted in receivers:
                if (at, wanted) == (layer, part):
                    index = head if part == "q" else head // (self.heads // self.keys)
                    cut = slice(start + index * self.width, start + (index + 1) * self.width)
                    out[..., cut] = seen["part"][layer, part][..., cut]
            return out

        return D(self.run(ids, put_parts=receive)[0])


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("freeze", [("heads",), ("heads", "mlps")], ids=str)
def test_paths_to_the_logits_are_those_of_hooks_by_hand(model, pair, implementation, freeze):
    ids, twin = pair
    hand = ByHand(model)
    found = path_patch(model, ids, twin, D, freeze=freeze, implementation=implementation)
    before = D(hand.run(ids)[0])
    for head in found.layout.heads():
        expected = hand.path(ids, twin, head, freeze_mlps=len(freeze) > 1) - before
        near(found.heads[:, head.layer, head.head], expected)
    near(found.clean, before)
    near(found.corrupt, D(hand.run(twin)[0]))
    assert found.about["way"] == ("frozen" if implementation == "auto" else "full")


@pytest.mark.parametrize(
    ("receivers", "position"),
    [(["3.1.q"], -1), (["3.1.q", "2.0.q"], -1), (["3.1.k"], -1), (["3.2.v", "3.0.k"], None), (["2.3.k"], 3)],
    ids=str,
)
def test_paths_to_queries_keys_and_values_are_those_of_hooks_by_hand(model, pair, receivers, position):
    """Llama has grouped keys: keys and values are those of the whole group."""
    ids, twin = pair
    hand = ByHand(model)
    found = path_patch(model, ids, twin, D, receivers=receivers, position=position)
    told = [(one.head.layer, one.head.head, one.part) for one in map(Receiver.parse, receivers) if one.head is not None]
    columns = slice(None) if position is None else slice(position, position + 1 or None)
    before, top = D(hand.run(ids)[0]), max(layer for layer, _, _ in told)
    for head in found.layout.heads():
        if head.layer >= top:
            assert found.heads[:, head.layer, head.head].isnan().all()
            continue
        near(found.heads[:, head.layer, head.head], hand.path(ids, twin, head, told, columns) - before)
    assert float(found.heads.nan_to_num().abs().max()) > 1e-2
    assert found.about["way"] == ("cached" if position == -1 else "full")


def test_total_effects_are_those_of_hooks_by_hand(model, pair):
    ids, twin = pair
    hand = ByHand(model)
    _, other = hand.run(twin)
    before = D(hand.run(ids)[0])
    found = activation_patch(model, ids, twin, D, nodes=["1.2", "3.0", "mlp:2"])
    for head in (Head(1, 2), Head(3, 0)):

        def put(layer, z, head=head):
            if layer == head.layer:
                z = z.clone()
                z[:, -1, head.head] = other["z"][layer][:, -1, head.head]
            return z

        near(found.heads[:, head.layer, head.head], D(hand.run(ids, put)[0]) - before)

    def feed(layer, out):
        if layer == 2:
            out = out.clone()
            out[:, -1] = other["mlp"][layer][:, -1]
        return out

    assert found.mlps is not None
    near(found.mlps[:, 2], D(hand.run(ids, None, feed)[0]) - before)
    assert found.mlps[:, 0].isnan().all() and found.heads[:, 0].isnan().all()


@pytest.mark.parametrize("head", [Head(0, 1), Head(2, 3)])
def test_mean_ablation_from_one_prompt_is_patching_from_it(pair, head):
    """Over tokens: where one token is repeated and only rotary positions tell, the mean is every position's output.
    And over prompts: the mean of one prompt.
    """
    (ids, twin), model = pair, llama()
    one = torch.full((1, T), 7)
    with torch.no_grad(), steer(model, Ablate(heads=[head], mode="mean", statistics=head_outputs(model, one))):
        ablated = D(model(ids).logits[:, -1])
    found = activation_patch(model, ids, one.expand(B, -1), D, nodes=[head], position=None)
    near(found.clean + found.heads[:, head.layer, head.head], ablated)
    assert float((ablated - found.clean).abs().max()) > 1e-2
    others = [other for other in layout(model).heads() if other != head]
    for prompt in (one, twin[:1]):
        patched = activation_patch(model, ids, prompt.expand(B, -1), D, nodes=[head], position=None)
        alone = faithfulness(model, others, ids, prompt.expand(B, -1), D, mode="mean").circuit
        near(torch.tensor(alone), (patched.clean + patched.heads[:, head.layer, head.head]).double().mean().float())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"receivers": "3.1.q"}, {"receivers": ["3.1.v", "mlp:2"]}, {"senders": ["0.1", "mlp:1"]},
     {"receivers": "3.0.k", "position": None}, {"receivers": "2.1.v", "position": torch.tensor([3, 4, 5])},
     {"batch_tokens": 30}],
    ids=str,
)  # fmt: skip
def test_the_fast_ways_give_the_numbers_of_the_reference(model, pair, options: Any, padded):
    clean, corrupt = pair
    if padded:
        mask = torch.ones(B, T).long()
        mask[0, :2] = mask[2, :1] = 0
        clean, corrupt = ({"input_ids": ids, "attention_mask": mask} for ids in (clean, corrupt))
    fast = path_patch(model, clean, corrupt, D, **options)
    slow = path_patch(model, clean, corrupt, D, implementation="reference", **options)
    torch.testing.assert_close(fast.heads, slow.heads, atol=1e-4, rtol=1e-4, equal_nan=True)
    if slow.mlps is not None:
        torch.testing.assert_close(fast.mlps, slow.mlps, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert slow.about["way"] == "full"
    assert float(slow.heads.nan_to_num().abs().max()) > 1e-3


def test_padding_on_the_left_changes_nothing(model, pair):
    ids, twin = pair
    plain = path_patch(model, ids[:1], twin[:1], logit_difference(RIGHT[:1], WRONG[:1]), receivers="3.1.q")
    front = torch.nn.functional.pad(torch.stack([ids[0], twin[0]]), (2, 0))
    mask = torch.nn.functional.pad(torch.ones(1, T).long(), (2, 0))
    clean, corrupt = ({"input_ids": one[None], "attention_mask": mask} for one in front)
    padded = path_patch(model, clean, corrupt, logit_difference(RIGHT[:1], WRONG[:1]), receivers="3.1.q")
    torch.testing.assert_close(plain.heads, padded.heads, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_prompt_that_is_its_own_counterpart_changes_nothing(model, pair, implementation):
    ids, _ = pair
    for found in (
        path_patch(model, ids, ids, D, implementation=implementation),
        path_patch(model, ids, ids, D, receivers="3.1.q", implementation=implementation),
        activation_patch(model, ids, ids, D, nodes=["0.0", "mlp:1"], implementation=implementation),
    ):
        assert float(found.heads.nan_to_num().abs().max()) == 0
        with pytest.raises(ValueError, match="cannot be divided"):
            found.map()


def test_the_average_of_all_is_the_corrupt_run(model, pair):
    """All heads and MLPs at all positions from the corrupt run: only the embedding of the last token is left, equal."""
    from headwise.heads._patch_runs import Prompts, Runs

    ids, twin = pair
    with Runs("test", model, Prompts.of("test", model, ids, twin), position=None, at=-1) as runs:
        ((_, logits, _),) = runs.run([(runs.layout.heads(), runs.feeding)])
        assert runs.corrupt.logits is not None
        near(D(logits)[0], D(runs.corrupt.logits))


def test_effects_add_up_in_a_model_that_is_linear(pair):
    """Heads and MLPs and the norm frozen: what all heads do at once is the sum of what each does."""
    from headwise.heads._patch_runs import Prompts, Runs
    from headwise.heads.attribution import Tail

    ids, twin = pair
    for model in (gpt2(), llama()):
        each = path_patch(model, ids, twin, D, freeze=("heads", "mlps", "norm"))
        runs = Runs("test", model, Prompts.of("test", model, ids, twin), position=-1, at=-1, freeze=("heads", "mlps"))
        with runs:
            assert runs.clean.final is not None and runs.clean.logits is not None
            tail = Tail.of(model, runs.sites, runs.clean.final[:, -1], runs.clean.logits)
            ((_, _, final),) = runs.run([(runs.layout.heads(), [])])
            assert final is not None
            near(each.heads.sum((1, 2)), D(tail.linear(final))[0] - each.clean)


def test_a_sender_before_the_last_column_reaches_the_logits_only_through_heads(model, pair):
    ids, twin = pair
    found = path_patch(model, ids, twin, D, position=3)
    assert float(found.heads.abs().max()) < 1e-5
    assert float(activation_patch(model, ids, twin, D, position=3).heads.abs().max()) > 1e-2


@pytest.mark.parametrize("position", [-1, None])
def test_attribution_patching_is_the_slope(pair, position):
    """With corrupt values a small step away, the estimate is the effect up to the second order."""
    for model in (gpt2(), llama()):
        ids, twin = pair
        estimate = attribution_patch(model, ids, twin, D, position=position, nodes=["1.1", "2.3", "mlp:2"])
        with torch.no_grad(), record(model, ["heads", "mlp"]) as seen:
            model(ids)
            own = {str(site): value.clone() for site, value in seen.items()}
            model(twin)
            other = {str(site): value.clone() for site, value in seen.items()}
        step = 1e-2
        hand = ByHand(model)
        columns = slice(-1, None) if position == -1 else slice(None)

        def move(layer, z, own=own, other=other, columns=columns, step=step):
            if layer == 2:
                z = z.clone()
                shift = other["heads:2"] - own["heads:2"]
                z[:, columns, 3] += step * shift[:, columns, 3]
            return z

        slope = (D(hand.run(ids, move)[0]) - D(hand.run(ids)[0])) / step
        torch.testing.assert_close(estimate.heads[:, 2, 3], slope, atol=2e-2, rtol=5e-2)
        assert estimate.mlps is not None and estimate.heads[:, 0].isnan().all()


def test_the_planted_heads_are_found():
    """Copying needs the previous-token head and the induction head, and no other; along the paths that were built."""
    from headwise.specimens import planted

    model = planted.build()
    generator = torch.Generator().manual_seed(0)
    words = torch.stack([torch.randperm(28, generator=generator)[:8] + 2 for _ in range(8)])
    other = words.clone()
    other[:, 5] = 31
    last = words[:, 4:5]
    start = torch.zeros(8, 1, dtype=torch.long)
    clean, corrupt = (torch.cat([start, told, last], 1) for told in (words, other))
    metric = logit_difference(words[:, 5], other[:, 5])
    found = path_patch(model, clean, corrupt, metric).map()
    assert found.top(k=1) == [planted.INDUCTION]
    assert found.of()[planted.INDUCTION] == pytest.approx(1, abs=0.02)
    # Counterparts in which another word came before: the induction head must look elsewhere.
    moved = words.clone()
    moved[:, [4, 6]] = moved[:, [6, 4]]
    corrupt = torch.cat([start, moved, last], 1)
    metric = logit_difference(words[:, 5], words[:, 7])
    induction = str(planted.INDUCTION)
    keys = path_patch(model, clean, corrupt, metric, receivers=f"{induction}.k", position=None).map()
    assert keys.top(k=1) == [planted.PREVIOUS]
    assert keys.of()[planted.PREVIOUS] == pytest.approx(1, abs=0.02)
    queries = path_patch(model, clean, corrupt, metric, receivers=f"{induction}.q", position=None).map("none")
    assert queries.of()[planted.PREVIOUS] == pytest.approx(0, abs=0.05)


OTHERS = ["gemma2", "qwen3", "gpt_neox", "opt", "phi3", "granite", "mistral", "cohere"]


@pytest.mark.parametrize("name", [name for name in OTHERS if name in FAMILIES])
def test_other_families(name):
    """Post-norms, softcaps, windows, parallel blocks, positions of their own: fast and reference agree."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, batch=2, length=12, padding="left" if family.padded else None)
    twin = dict(inputs)
    twin["input_ids"] = inputs["input_ids"].clone()
    twin["input_ids"][:, 6] = 9
    metric = logit_difference(torch.tensor([10, 11]), torch.tensor([12, 13]))
    last = find_last(model)
    every: list[Any] = [{}, {"receivers": f"{last}.0.q"}]
    for options in every:
        fast = path_patch(model, inputs, twin, metric, **options)
        slow = path_patch(model, inputs, twin, metric, implementation="reference", **options)
        assert fast.about["way"] != "full"
        torch.testing.assert_close(fast.heads, slow.heads, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert float(slow.heads.nan_to_num().abs().max()) > 0


def find_last(model):
    from headwise.hf.addresses import layout

    return max(layer for layer, heads in enumerate(layout(model).main.heads) if heads)


def test_metrics():
    logits = torch.randn(4, B, V, generator=torch.Generator().manual_seed(0))
    row = torch.arange(B)
    near(D(logits), logits[:, row, RIGHT] - logits[:, row, WRONG])
    near(D(logits[0]), logits[0, row, RIGHT] - logits[0, row, WRONG])
    near(log_probability(RIGHT)(logits), logits.log_softmax(-1)[:, row, RIGHT])
    near(probability(RIGHT)(logits), logits.softmax(-1)[:, row, RIGHT])
    among = torch.tensor([[1, 7, 8], [9, 2, 8], [0, 5, 3]])
    near(centred_logit(RIGHT, among)(logits), logits[:, row, RIGHT] - logits[:, row[:, None], among].mean(-1))
    near(centred_logit(RIGHT, among)(logits + 3.0), centred_logit(RIGHT, among)(logits))


def test_effects_are_normalised_and_kept(tmp_path, pair):
    ids, twin = pair
    found = path_patch(llama(), ids, twin, D, senders=["0.1", "2.2", "mlp:1"])
    unit = float(found.corrupt.mean() - found.clean.mean())
    table = found.map().of()
    assert table[Head(2, 2)] == pytest.approx(float(found.heads[:, 2, 2].mean()) / unit, rel=1e-5)
    assert found.map("none").of()[Head(0, 1)] == pytest.approx(float(found.heads[:, 0, 1].mean()), rel=1e-5)
    assert found.map("clean").of()[Head(0, 1)] == pytest.approx(
        float(found.heads[:, 0, 1].mean() / found.clean.mean()), rel=1e-5
    )
    assert table[Head(1, 1)] is None and set(found.mean_mlps()) == {1}
    found.save(tmp_path / "effects.json")
    again = NodeEffects.load(tmp_path / "effects.json")
    torch.testing.assert_close(again.heads, found.heads, equal_nan=True)
    torch.testing.assert_close(again.mlps, found.mlps, equal_nan=True)
    assert again.layout == found.layout and again.about["receivers"] == ["logits"]
    (tmp_path / "other.json").write_text(json.dumps({"probes": {}}))
    with pytest.raises(InputError, match="no node effects"):
        NodeEffects.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": torch.zeros(B, T + 1).long()}, r"clean is \(3, 9\) but corrupt is \(3, 10\)"),
        ({"clean": torch.full((B, T), V)}, "ids from 50 to 50"),
        ({"position": T}, "position is 9; the prompts have columns 0 to 8"),
        ({"position": torch.tensor([1, 2])}, "one column|a column for each"),
        ({"position_of_metric": -10}, "position_of_metric is -10"),
        ({"senders": ["1.1", "1.1"]}, "1.1 is given twice"),
        ({"senders": ["7.0"]}, "layer 7 is out of range"),
        ({"senders": ["mlp:9"]}, "mlp:9 but the model has layers 0 to 3"),
        ({"senders": []}, "no nodes"),
        ({"receivers": "2.1.q", "senders": ["2.0"]}, "2.0 lies behind the receivers"),
        ({"receivers": "0.1.q"}, "no head comes before 0.1.q"),
        ({"receivers": ["2.1.q", "2.1.q"]}, "given twice"),
        ({"receivers": "2.1.z"}, "'2.1.z' is none"),
        ({"receivers": ["logits", "2.1.q"]}, "the logits go with no other"),
        ({"freeze": ("mlps",)}, "freeze is"),
        ({"freeze": ("heads", "mlps", "norm"), "receivers": "2.1.q"}, "only for receivers='logits'"),
        ({"metric": lambda logits: logits.sum()}, "metric: gave"),
    ],
    ids=str,
)
def test_bad_input(pair, change: Any, message):
    given: dict[str, Any] = {"clean": pair[0], "corrupt": pair[1], "metric": D} | change
    clean, corrupt, metric = (given.pop(name) for name in ("clean", "corrupt", "metric"))
    with pytest.raises(ValueError, match=message):
        path_patch(llama(), clean, corrupt, metric, **given)


def test_bad_prompts_and_models(pair):
    ids, twin = pair
    mask = torch.ones(B, T).long()
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        path_patch(llama(), {"input_ids": ids, "attention_mask": mask}, {"input_ids": twin, "attention_mask": mask}, D)
    left = torch.ones(B, T).long()
    left[0, 0] = 0
    with pytest.raises(ValueError, match="padded in different places"):
        path_patch(llama(), {"input_ids": ids, "attention_mask": left}, twin, D)
    with pytest.raises(ValueError, match="training mode"):
        path_patch(llama().train(), ids, twin, D)
    with pytest.raises(ValueError, match="pixel_values"):
        path_patch(llama(), {"input_ids": ids, "pixel_values": ids}, twin, D)
    with pytest.raises(UnsupportedModel, match="BertForMaskedLM is no causal decoder"):
        path_patch(FAMILIES["bert"].build(), ids, twin, D)
    with pytest.raises(ValueError, match="token 2 as right and as wrong"):
        logit_difference(torch.tensor([1, 2]), torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="not among its candidates"):
        centred_logit(torch.tensor([1]), torch.tensor([[2, 3]]))
    with pytest.raises(ValueError, match="k >= 2"):
        centred_logit(torch.tensor([1]), torch.tensor([[1]]))


def test_the_model_is_left_as_it_was(pair):
    model = llama()
    ids, twin = pair
    before = model(ids).logits
    with pytest.raises(ValueError, match="metric"):
        path_patch(model, ids, twin, lambda logits: logits.sum(), receivers="3.1.q")
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
