"""The recipe `vision-language-model`: a LLaVA aligned anew, as SAISA or NAAViT, in two stages."""

import json
from pathlib import Path
from typing import Any

from headwise.errors import InputError

__all__ = ["vision_language_model"]

ALIGNMENTS = ("saisa", "naavit", "embedding")
STEPS = {"projectors": 100, "all": 200}
RATES = {"projectors": 1e-3, "all": 2e-4}


def vision_language_model(asked: Any) -> tuple[dict[str, Any], list[str]]:
    """What `recipes.vision_language` does; --from: a folder or hub id of a LLaVA, the specimen where none is named.

    --steps: of both stages together, a third of them the first stage's.
    """
    from headwise.models.conversion import convert
    from headwise.models.saisa_costs import prefill_flops
    from headwise.recipes.vision_language import load_conversations, train_vision_language

    alignment = asked.options.get("alignment") or "saisa"
    if alignment not in ALIGNMENTS:
        raise InputError(f"--alignment: {alignment!r} is unknown; choose {', '.join(ALIGNMENTS)}")
    data, steps = asked.data("shapes"), asked.steps
    model, processor = _load(asked.options.get("from"))
    if alignment != getattr(model.config, "alignment", "embedding"):
        model = convert(model, to=alignment)
    conversations = load_conversations(data, model, processor, seed=asked.seed)
    count = STEPS if steps is None else {"projectors": max(1, steps // 3), "all": max(1, steps - steps // 3)}
    asked.said.log(f"training on {len(conversations)} conversations, {count['projectors']} + {count['all']} steps")
    found = train_vision_language(
        model, conversations, steps=count, learning_rates=RATES, out=asked.folder, seed=asked.seed
    )
    processor.save_pretrained(asked.folder)
    text, image = 64, conversations.image_tokens
    cost = prefill_flops(model.config, text, image)
    figures = {
        "losses": found.losses,
        "parameters": found.parameters,
        "prefill": {"text": text, "image": image, "flops": cost},
    }
    losses = ", ".join(f"{stage} {value:.3f}" for stage, value in found.losses.items())
    lines = [
        f"{alignment} on {data}: loss on held-out conversations {losses}",
        f"a prompt of {text} text and {image} image tokens costs {cost:,} operations",
    ]
    return {"data": data, "alignment": alignment, "metrics": figures}, lines


def _load(source: str | None) -> tuple[Any, Any]:
    import transformers

    from headwise.hf.load import load
    from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration
    from headwise.specimens.registry import load_specimen, specimen_names

    written = Path(source or "") / "config.json"
    ours = written.is_file() and json.loads(written.read_text(encoding="utf-8")).get("model_type")
    if source and ours == SaisaConfig.model_type:
        network = SaisaForConditionalGeneration.from_pretrained(source, use_safetensors=True)
        return network, transformers.AutoProcessor.from_pretrained(source, local_files_only=True)
    name = source or "vision-language"
    loaded = load_specimen(name) if name in specimen_names() else load(name)
    if type(loaded.model) is not transformers.LlavaForConditionalGeneration or loaded.processor is None:
        raise InputError(f"--from: {name} is {type(loaded.model).__name__}; give a LLaVA with its processor")
    return loaded.model, loaded.processor
