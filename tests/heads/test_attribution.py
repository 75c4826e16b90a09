"""Parts of a logit add up to it in every kind of decoder, and differences of parts are direct effects."""

import pytest
import torch
from tests.heads.test_patching import RIGHT, WRONG, D, gpt2, llama, near
from tests.zoo import FAMILIES

from headwise.errors import UnsupportedModel
from headwise.heads.attribution import logit_attribution, logit_lens
from headwise.heads.patching import path_patch

ASKED = torch.stack([RIGHT, WRONG], 1)


@pytest.fixture(scope="module")
def pair():
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    twin = ids.clone()
    twin[:, 3] = (ids[:, 3] + 5) % 50
    return ids, twin


@pytest.mark.parametrize("position", [-1, 4])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_parts_add_up_to_the_logits(make, pair, position):
    model = make()
    parts = logit_attribution(model, pair[0], ASKED, position=position)
    near(parts.heads.sum((1, 2)) + parts.mlps.sum(1) + parts.rest, parts.logits)
    with torch.no_grad():
        near(parts.logits, model(pair[0]).logits[:, position].gather(-1, ASKED))


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "gpt_neox", "phi", "cohere", "granite", "qwen3", "mixtral", "olmo2"]
)
def test_other_families_add_up(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, batch=2, length=12, padding="left" if family.padded else None)
    asked = torch.tensor([9, 10, 30])
    parts = logit_attribution(model, inputs, asked)
    whole = parts.heads.nansum((1, 2)) + parts.mlps.sum(1) + parts.rest
    near(whole, parts.logits)
    with torch.no_grad():
        said = model(**inputs).logits[:, -1, asked]
    cap = getattr(model.config, "final_logit_softcapping", None)
    near(parts.logits if cap is None else cap * torch.tanh(parts.logits / cap), said)
    assert float(parts.heads.nan_to_num().abs().max()) > 1e-3


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_direct_effect_is_a_difference_of_parts(make, pair):
    """What a head writes on the corrupt prompt, read under the clean prompt's scale, is the direct path's effect."""
    model = make()
    from headwise.heads._patch_runs import Prompts, Runs
    from headwise.heads.attribution import Tail
    from headwise.hf.projections import head_writes

    ids, twin = pair
    found = path_patch(model, ids, twin, D, freeze=("heads", "mlps", "norm"))
    clean = logit_attribution(model, ids, ASKED)
    with Runs("test", model, Prompts.of("test", model, ids, twin), position=-1, at=-1) as runs:
        assert runs.clean.final is not None and runs.clean.logits is not None
        tail = Tail.of(model, runs.sites, runs.clean.final[:, -1], runs.clean.logits)
        directions, _ = tail.directions(ASKED)
        for layer, part in enumerate(runs.sites.layers):
            assert part.projection is not None
            matrix = head_writes(part.projection, 4)
            z = runs.corrupt.heads[layer][:, -1]
            share = torch.einsum("bhe,hec,bnc->bhn", z, matrix, directions)
            change = share - clean.heads[:, layer]
            near(found.heads[:, layer], (change[..., 0] - change[..., 1]).detach())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_lens_ends_in_the_logits_and_starts_at_the_embedding(make, pair):
    model = make()
    ids = pair[0]
    depths = logit_lens(model, ids, ASKED)
    assert depths.shape == (3, 5, 2)
    with torch.no_grad():
        said = model(ids, output_hidden_states=True)
        near(depths[:, -1], said.logits[:, -1].gather(-1, ASKED))
        norm = model.transformer.ln_f if make is gpt2 else model.model.norm
        for layer in range(4):
            raw = model.lm_head(norm(said.hidden_states[layer][:, -1]))
            near(depths[:, layer], raw.gather(-1, ASKED))


def test_bad_input(pair):
    model = llama()
    with pytest.raises(ValueError, match="the model knows 0 to 49"):
        logit_attribution(model, pair[0], torch.tensor([50]))
    with pytest.raises(ValueError, match="position is 9"):
        logit_attribution(model, pair[0], ASKED, position=9)
    with pytest.raises(ValueError, match="tokens have shape"):
        logit_attribution(model, pair[0], ASKED[:2])
    mask = torch.ones(3, 9).long()
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="padding in some prompt"):
        logit_attribution(model, {"input_ids": pair[0], "attention_mask": mask}, ASKED, position=1)


def test_a_model_that_does_more_to_its_logits_is_refused(pair):
    model = llama()
    model.register_forward_hook(lambda module, args, out: out.__setattr__("logits", out.logits.sin() * 9) or out)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: final norm and unembedding give other logits"):
        logit_attribution(model, pair[0], ASKED)
