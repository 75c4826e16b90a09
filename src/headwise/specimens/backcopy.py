"""The `backcopy` specimen: one layer, one head, Bigram-Backcopy text, with checkpoints while its sink grows.

The recipe is that of the active-dormant paper's reproduction (32 symbols, a Dirichlet(0.1) table, three triggers, 48
tokens, AdamW 2e-3), with 3,000 steps instead of 1,000, until the sink is strong. The architecture follows the paper's
code: learned positions, LayerNorm before each block, no biases, an MLP of four times the width with ReLU, an untied
output.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.training import OptimiserSpec, fit

NAME = "backcopy"
SUMMARY = "one layer, one head, Bigram-Backcopy text: an active-dormant head, with checkpoints while its sink grows"
LAYERS, STEPS = 1, 3000
CHECKPOINTS = (0, 50, 100, 200, 400, 700, 1000, 1500, 2000)
VOCABULARY, TRIGGERS, LENGTH, BATCH = 32, 3, 48, 32
RATE, BETAS, DECAY = 2e-3, (0.9, 0.99), 1e-4


def build(layers: int = LAYERS, hidden: int = 64, length: int = LENGTH, symbols: int = VOCABULARY) -> nn.Module:
    """The untrained model; BOS is token 0."""
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=symbols + 1,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=1,
            max_position_embeddings=length,
            activation_function="relu",
            do_layer_norm_before=True,
            enable_bias=False,
            layer_norm_elementwise_affine=True,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def task(seed: int = 0) -> BigramBackcopy:
    """The text: its table comes from `seed`."""
    return BigramBackcopy(VOCABULARY, TRIGGERS, LENGTH, seed=seed)


def loss(model: Any, input_ids: Tensor) -> Tensor:
    """Next-token cross-entropy over all rows, of a transformers model or of a plain module that gives logits."""
    output = model(input_ids)
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits[:, :-1].mT, input_ids[:, 1:])


@torch.no_grad()
def measure(model: nn.Module, text: BigramBackcopy, *, seed: int = 10_000, sequences: int = 128) -> dict[str, Any]:
    """The paper's figures for each layer: sink weight on ordinary and trigger rows, weight on the token before, drain.

    Rows 0 and 1 are left out: row 0 sees only itself, and row 1 has BOS as the token before.
    """
    ids = text.sample(sequences, torch.Generator().manual_seed(seed))
    values: list[Any] = []
    decoder = model.get_submodule("model.decoder.layers")
    handles = [
        layer.get_submodule("self_attn.v_proj").register_forward_hook(lambda _, __, out: values.append(out))
        for layer in decoder.children()
    ]
    chosen = model.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        output = model(ids, output_attentions=True)
    finally:
        model.set_attn_implementation(chosen)  # pyright: ignore[reportCallIssue]
        for handle in handles:
            handle.remove()
    trigger = text.trigger_mask(ids)[:, 2:]
    figures: dict[str, Any] = {"losses": text.losses(output.logits, ids), "layers": []}
    for weights, value in zip(output.attentions, values, strict=True):
        rows = weights[:, 0, 2:]
        before = rows.diagonal(offset=1, dim1=1, dim2=2)  # row t and key t - 1, from t = 2 on
        norms = value.norm(dim=-1)
        figures["layers"].append(
            {
                "sink_other": float(rows[..., 0][~trigger].mean()),
                "sink_trigger": float(rows[..., 0][trigger].mean()),
                "before_trigger": float(before[trigger].mean()),
                "drain": float(norms[:, 0].mean() / norms[:, 1:].mean()),
            }
        )
    return figures


def names(symbols: int = VOCABULARY) -> tuple[str, ...]:
    """BOS, then `c1`, `c2`, ...; triggers carry a star in their name (`c7*`)."""
    triggers = set(task().triggers)
    return ("<bos>", *[f"c{i}*" if i in triggers else f"c{i}" for i in range(1, symbols + 1)])


def train(
    out: str | Path,
    *,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    steps: int | None = None,
    layers: int = LAYERS,
    name: str = NAME,
    checkpoints: tuple[int, ...] = CHECKPOINTS,
) -> Path:
    """Train from nothing and write model, checkpoints, tokenizer and card to `out`. steps: another number of steps."""
    from headwise.specimens.registry import write_specimen

    text, steps = task(), STEPS if steps is None else steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(layers)
    states: dict[int, dict[str, Tensor]] = {}
    along: dict[str, Any] = {}

    def keep(step: int, model: nn.Module) -> None:
        model.eval()
        states[step] = {key: value.detach().clone() for key, value in model.state_dict().items()}
        along[str(step)] = measure(model, text)
        model.train()

    history = fit(
        model,
        lambda step, generator: text.sample(BATCH, generator),
        loss,
        steps=steps,
        seed=seed,
        optimiser=OptimiserSpec(lr=RATE, betas=BETAS, weight_decay=DECAY),
        clip=None,
        log=log,
        checkpoints=[step for step in checkpoints if step < steps],
        on_checkpoint=keep,
    )
    model = model.to(torch.bfloat16).float()  # what ships is what is measured
    card = {
        "summary": SUMMARY if name == NAME else f"{layers} layers of the {NAME} specimen",
        "seed": seed,
        "steps": steps,
        "minutes": round(history.seconds / 60, 1),
        "cpu_minutes": round(history.cpu_seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "recipe": {
            "task": f"BigramBackcopy({VOCABULARY}, {TRIGGERS}, {LENGTH}, seed=0), {BATCH} sequences a step",
            "optimiser": f"AdamW {RATE}, betas {BETAS}, weight decay {DECAY}, no schedule, no clipping",
            "layers": layers,
        },
        "bayes": text.bayes_loss(text.sample(128, torch.Generator().manual_seed(10_000))),
        "figures": measure(model.eval(), text),
        "along_training": along,
        "checkpoints": sorted(states),
    }
    return write_specimen(Path(out), model, names(), card, name, states)
