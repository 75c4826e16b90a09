"""Effects agree with an outside implementation on a random GPT-2 (fixture: `make oracles`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from headwise.heads.attribution import logit_attribution
from headwise.heads.effects import logit_difference
from headwise.heads.patching import activation_patch, path_patch

FIXTURE = Path(__file__).parents[1] / "fixtures" / "transformer_lens.safetensors"


@pytest.fixture(scope="module")
def case() -> tuple[Any, dict[str, torch.Tensor]]:
    with safe_open(FIXTURE, "pt") as stored:
        config = transformers.GPT2Config(**json.loads(stored.metadata()["configs"])["patching"])
        names = [key for key in stored.keys() if key.startswith("patching.")]  # noqa: SIM118
        given = {key.removeprefix("patching."): stored.get_tensor(key) for key in names}
    model = transformers.GPT2LMHeadModel(config).eval()
    model.load_state_dict({key.removeprefix("weights."): v for key, v in given.items() if key.startswith("weights.")})
    return model, given


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float(theirs.nan_to_num().abs().max()) > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_effects(case, implementation):
    model, given = case
    metric = logit_difference(given["right"], given["wrong"])
    pair = (given["ids"], given["twin"])
    total = activation_patch(model, *pair, metric, implementation=implementation)
    near(total.clean, given["clean"])
    near(total.heads, given["total"])
    near(path_patch(model, *pair, metric, implementation=implementation).heads, given["logits"])
    queries = path_patch(model, *pair, metric, receivers=["3.1.q", "2.0.q"], implementation=implementation)
    near(queries.heads, given["queries"])


def test_attribution_is_what_heads_write_read_by_the_unembedding(case):
    model, given = case
    asked = torch.stack([given["right"], given["wrong"]], 1)
    parts = logit_attribution(model, given["ids"], asked)
    with torch.no_grad():
        stream = {}
        hook = model.transformer.ln_f.register_forward_pre_hook(lambda module, args: stream.update(x=args[0][:, -1]))
        model(given["ids"])
        hook.remove()
        scale = (stream["x"].var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()[:, None, None]
        written = given["written"]
        normed = (written - written.mean(-1, keepdim=True)) / scale * model.transformer.ln_f.weight
        near(parts.heads, torch.einsum("blhc,bnc->blhn", normed, model.lm_head.weight[asked]))
