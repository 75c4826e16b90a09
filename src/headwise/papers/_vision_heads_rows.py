"""The rows of vision-aware head reinforcement; the record of the paper is in vision_aware_head_reinforcement.py."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edits import BiasGroup, ScaleHeads
from headwise.attend.groups import image_tokens, positions
from headwise.heads.vision import aware_heads, token_divergence, vision_divergence
from headwise.hf.images import image_positions, without
from headwise.hf.session import steer
from headwise.papers import _vision_heads_setup as setup
from headwise.papers._vision_heads_setup import ALPHA, LAYERS, Said, Subject
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, mean, paired_bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.specimens.vision_language import IMAGE_TOKENS, answers, vision_language_inputs
from headwise.steering.vision_head_reinforcement import VisionAwareHeadReinforcement
from headwise.tasks.captions import QUESTION_KINDS, CaptionedShapes
from headwise.tasks.hallucination import Chair, chair, polling

ALPHAS = (1.0, 1.5, 2.0, 3.0)
TOP = 2  # heads of a layer that are blinded
BLIND_DRAWS = 12
OVERHEAD_RUNS, OVERHEAD_TOKENS, OVERHEAD = 5, 64, 1.10


def hallucination(run: Run, one: Subject) -> Measured:
    """What captions name that is not there, on counterfactual pictures and on ordinary ones."""
    run.log("writing captions")
    texts = {"ordinary": setup.written(one.model, one.ordinary), "counterfactual": plain_captions(one)}
    rates = {name: chair(texts[name], scenes.objects()) for name, scenes in _both(one).items()}
    wrong = {name: setup.absent(texts[name], scenes) for name, scenes in _both(one).items()}
    low, high = (wrong["counterfactual"] - 0.4).tolist(), wrong["ordinary"].tolist()
    margin = float(wrong["counterfactual"].mean() - wrong["ordinary"].mean()) - 0.4
    said = told(one, "counterfactual")
    errors = (said.shapes != one.other.shapes)[:, 1:]
    typical = float(said.typical.sum() * 3 / errors.sum())
    return Measured(
        measured=f"counterfactual pictures: {_rates(rates['counterfactual'])}; {typical:.0%} of the wrong words are "
        "what usually follows (14 % by chance)",
        control=f"ordinary pictures: {_rates(rates['ordinary'])}",
        holds=margin >= 0,
        margin=margin,
        interval=paired_bootstrap_interval(low, high, seed=run.seed),
        values={f"CHAIR_i, {name}": rate.chair_i for name, rate in rates.items()} | {"typical among errors": typical},
    )


def _rates(rate: Chair) -> str:
    return f"CHAIR_s {rate.chair_s:.3f}, CHAIR_i {rate.chair_i:.3f}, recall {rate.recall:.3f}"


def _both(one: Subject) -> dict[str, CaptionedShapes]:
    return {"ordinary": one.ordinary, "counterfactual": one.other}


def told(one: Subject, which: str) -> Said:
    """What the plain model says next."""
    return one.once(("told", which), lambda: setup.told(one.model, _both(one)[which]))


def plain_captions(one: Subject) -> list[str]:
    return one.once("plain captions", lambda: setup.written(one.model, one.other))


def reinforced_captions(one: Subject) -> list[str]:
    return one.once("VHR captions", lambda: setup.written(one.model, one.other, setup.reinforced()))


def metric(run: Run, one: Subject) -> Measured:
    """T-VHD where a shape is about to be said, and where a comma is."""
    run.log("divergence of every word")
    found, shapes, commas = setup.caption_divergence(one.model, one.ordinary)
    token = token_divergence(found.divergence)
    there, gone = token[:, shapes].mean(1), token[:, commas].mean(1)
    ratio = float(there.mean() / gone.mean())
    rows = torch.stack([there, gone], 1).numpy()
    rng = np.random.default_rng(run.seed)
    draws = [rows[rng.integers(0, len(rows), len(rows))].mean(0) for _ in range(2000)]
    low, high = np.quantile([a / b for a, b in draws], [0.025, 0.975])
    relative = token_divergence(found.relative)
    noise = one.ordinary.image.clone()
    blank = CaptionedShapes(torch.full_like(noise, 0.45), one.ordinary.shapes, one.ordinary.cells)
    empty, _, _ = setup.caption_divergence(one.model, blank[: setup.BATCH])
    return Measured(
        measured=f"T-VHD {float(there.mean()):.2f} before a shape, {float(gone.mean()):.2f} before a comma: "
        f"{ratio:.2f} times ({low:.2f} to {high:.2f})",
        control=f"over the norm of each head's output {float(relative[:, shapes].mean()):.2f} and "
        f"{float(relative[:, commas].mean()):.2f}; an empty picture has T-VHD "
        f"{float(token_divergence(empty.divergence)[:, shapes].mean()):.2f} before a shape",
        holds=ratio >= 1.3,
        margin=ratio - 1.3,
        interval=(float(low) - 1.3, float(high) - 1.3),
        values={"ratio": ratio},
    )


def aware(run: Run, one: Subject) -> Measured:
    """What is lost when the heads with the largest VHD cannot see the picture, and when as many others cannot."""
    table = setup.divergence_map(one)
    ranked = table.ranked()
    top = [head for layer in range(4) for head in [h for h in ranked if h.layer == layer][:TOP]]
    draws = table.matched_random(top, BLIND_DRAWS, seed=run.seed)
    run.log(f"blinding {len(top)} heads, and {len(draws)} other sets")

    def accuracy(heads: Sequence[Head]) -> Tensor:
        said = setup.told(one.model, one.other, lambda part: (BiasGroup(image_tokens(), float("-inf"), heads=heads),))
        return (said.shapes == one.other.shapes).float().mean(1)

    plain = (told(one, "counterfactual").shapes == one.other.shapes).float().mean(1)
    seeing, others = accuracy(top), torch.stack([accuracy(heads) for heads in run.progress(draws, "sets")])
    lost = [(plain - x).tolist() for x in (seeing, others.mean(0))]
    margin = mean(lost[0]) - mean(lost[1])
    each = (plain - others).mean(1)
    halves = [
        vision_divergence(one.model, vision_language_inputs(one.calibration[part])).divergence.mean(0).flatten()
        for part in (slice(0, None, 2), slice(1, None, 2))
    ]
    return Measured(
        measured=f"blinding the {TOP} heads of each layer with the largest VHD ({', '.join(map(str, top))}) costs "
        f"{mean(lost[0]):.3f} of accuracy",
        control=f"as many others, {len(draws)} sets: {mean(lost[1]):.3f} ({float(each.min()):.3f} to "
        f"{float(each.max()):.3f}); VHD of two halves of the pictures correlates with "
        f"{float(torch.corrcoef(torch.stack(halves))[0, 1]):.3f}",
        holds=margin >= 0,
        margin=margin,
        interval=paired_bootstrap_interval(*lost, seed=run.seed),
        values={"lost": mean(lost[0]), "lost by others": mean(lost[1])},
    )


def prior(run: Run, one: Subject) -> Measured:
    """Whether words that are made up owe less to the picture than words that are right."""
    run.log("divergence of right words and of typical ones")
    found, shapes, _ = setup.caption_divergence(one.model, one.other)
    token = token_divergence(found.divergence)[:, shapes[1:]]
    said = told(one, "counterfactual")
    right = (said.shapes == one.other.shapes)[:, 1:]
    typical = (said.shapes == said.before)[:, 1:] & ~right
    value = _auc(token[right], token[typical])
    rng = np.random.default_rng(run.seed)
    draws = []
    for _ in range(500):
        index = torch.from_numpy(rng.integers(0, len(token), len(token)))
        draws.append(_auc(token[index][right[index]], token[index][typical[index]]))
    low, high = np.quantile(draws, [0.025, 0.975])
    words = positions([1 + IMAGE_TOKENS + 2 + 2 * k for k in range(3)])
    deaf = setup.told(one.model, one.other, lambda part: (BiasGroup(words, float("-inf")),))
    typical_share, deaf_share = float(said.typical.mean()), float(deaf.typical.mean())
    return Measured(
        measured=f"T-VHD of right words {float(token[right].mean()):.2f}, of typical ones that are not there "
        f"{float(token[typical].mean()):.2f}: AUC {value:.3f} ({low:.3f} to {high:.3f}, {int(typical.sum())} made up)",
        control=f"with the words said so far hidden from all heads the typical word falls from {typical_share:.3f} to "
        f"{deaf_share:.3f} of the words, accuracy from {float(said.right.mean()):.3f} to "
        f"{float(deaf.right.mean()):.3f}",
        holds=value >= 0.5,
        margin=value - 0.5,
        interval=(float(low) - 0.5, float(high) - 0.5),
        values={"AUC": value, "typical": typical_share, "typical without words": deaf_share},
    )


def _auc(right: Tensor, wrong: Tensor) -> float:
    """How often a right word has the larger value, ties counting half."""
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, right) + torch.searchsorted(ordered, right, right=True)
    return float(below.double().mean() / (2 * len(wrong)))


def mitigates(run: Run, one: Subject) -> tuple[Measured, dict[str, dict[str, float]]]:
    """Typical words under VHR, and under the same factor on other heads."""
    run.log("reinforcing")
    chosen = setup.chosen_heads(one.model, one.other)
    layers = torch.zeros_like(chosen)
    layers[:, list(LAYERS)] = True
    draws = setup.random_heads(one, chosen, run.seed)
    arms: dict[str, Sequence[setup.Arm | None]] = {
        "plain": [None],
        "VHR": [setup.reinforced()],
        "no outlier rule": [setup.reinforced(drop_outliers=False)],
        "random heads": [setup.scaled(draw) for draw in draws],
        "the other half": [setup.scaled(layers & ~chosen)],
        "one choice for all": [setup.scaled(setup.upper_half(one))],
        "all heads": [setup.scaled(layers)],
    }
    found = {name: [setup.told(one.model, one.other, arm) for arm in arms[name]] for name in run.progress(arms, "arms")}
    typical = {name: torch.stack([x.typical for x in each]).mean(0).tolist() for name, each in found.items()}
    accuracy = {name: torch.stack([x.right for x in each]).mean(0).tolist() for name, each in found.items()}
    usual = {
        name: setup.told(one.model, one.ordinary, arm).right.tolist()
        for name, arm in {"plain": None, "VHR": setup.reinforced(), "all heads": _all_heads(one)}.items()
    }
    captions = {"plain": plain_captions(one), "VHR": reinforced_captions(one)}
    free = {name: chair(texts, one.other.objects()).chair_i for name, texts in captions.items()}
    parts = {
        "fall": (
            mean(typical["plain"]) - mean(typical["VHR"]) - 0.10,
            paired_bootstrap_interval((np.array(typical["plain"]) - 0.10).tolist(), typical["VHR"], seed=run.seed),
        ),
        "random": (
            mean(typical["random heads"]) - mean(typical["VHR"]),
            paired_bootstrap_interval(typical["random heads"], typical["VHR"], seed=run.seed),
        ),
    }
    margin = min(value for value, _ in parts.values())
    interval = (min(i[0] for _, i in parts.values()), min(i[1] for _, i in parts.values()))
    table = {
        name: {"typical": mean(typical[name]), "accuracy": mean(accuracy[name])} | _usual(usual, name) for name in arms
    }
    rest = "; ".join(f"{name} {_pair(table[name])}" for name in arms if name not in ("plain", "VHR"))
    return Measured(
        measured=f"typical words that are not there {table['plain']['typical']:.3f} plain, "
        f"{table['VHR']['typical']:.3f} under VHR (random heads - VHR {parts['random'][0]:+.4f}, "
        f"{parts['random'][1][0]:+.4f} to {parts['random'][1][1]:+.4f}); accuracy {table['plain']['accuracy']:.3f} and "
        f"{table['VHR']['accuracy']:.3f}; on ordinary pictures {mean(usual['plain']):.3f} and {mean(usual['VHR']):.3f}",
        control=f"typical / accuracy: {rest}; accuracy of all heads on ordinary pictures "
        f"{mean(usual['all heads']):.3f}; greedy captions: CHAIR_i {free['plain']:.3f} plain, {free['VHR']:.3f} under "
        f"VHR; {_polls(one)}",
        holds=margin >= 0,
        margin=margin,
        interval=interval,
        values={f"typical, {name}": row["typical"] for name, row in table.items()}
        | {f"CHAIR_i, {name}": rate for name, rate in free.items()}
        | {"accuracy, ordinary, plain": mean(usual["plain"]), "accuracy, ordinary, VHR": mean(usual["VHR"])},
    ), table


def _usual(usual: Mapping[str, list[float]], name: str) -> dict[str, float]:
    return {"ordinary": mean(usual[name])} if name in usual else {}


def _pair(row: Mapping[str, float]) -> str:
    return f"{row['typical']:.3f} / {row['accuracy']:.3f}"


def _all_heads(one: Subject) -> setup.Arm:
    return lambda part: (ScaleHeads(scale=ALPHA, heads=f"{LAYERS[0]}-{LAYERS[-1]}.*"),)


def _polls(one: Subject) -> str:
    """F1 of yes-or-no answers, plain and under VHR."""
    said = []
    for name, scenes in _both(one).items():
        for kind in QUESTION_KINDS:
            generator = torch.Generator().manual_seed(0)
            asked = [scenes.questions(kind, generator), scenes.questions(None, generator)]
            f1 = []
            for edits in ((), (VisionAwareHeadReinforcement(ALPHA),)):
                with steer(one.model, *edits):
                    words = [word for each in asked for word in answers(one.model, scenes, each.texts())]
                f1.append(polling(words, [bool(x) for each in asked for x in each.answer]).f1)
            said.append(f"{name} {kind} {f1[0]:.3f} to {f1[1]:.3f}")
    return "F1 of yes or no, plain to VHR: " + ", ".join(said)


def superior(run: Run, one: Subject) -> tuple[Measured, dict[str, float]]:
    """Objects that are not there in greedy captions: VHR beside contrastive decoding in two forms."""
    run.log("writing captions by other methods")
    scenes = one.other
    texts = {
        "plain": plain_captions(one),
        "VHR": reinforced_captions(one),
        "contrast with a distorted picture": setup.contrasted(one.model, scenes, "distorted", strength=1.0),
        "contrast with no picture": setup.contrasted(one.model, scenes, "none", strength=0.5),
        "all heads": setup.written(one.model, scenes, _all_heads(one)),
    }
    wrong = {name: setup.absent(each, scenes) for name, each in texts.items()}
    rates = {name: chair(each, scenes.objects()) for name, each in texts.items()}
    rivals = [name for name in texts if name.startswith("contrast")]
    best = min(rivals, key=lambda name: float(wrong[name].mean()))
    margin = float(wrong[best].mean() - wrong["VHR"].mean())
    return Measured(
        measured=f"VHR {_rates(rates['VHR'])}; " + "; ".join(f"{name} {_rates(rates[name])}" for name in rivals),
        control=f"plain {_rates(rates['plain'])}; all heads {_rates(rates['all heads'])}",
        holds=margin >= 0,
        margin=margin,
        interval=paired_bootstrap_interval(wrong[best].tolist(), wrong["VHR"].tolist(), seed=run.seed),
        values={f"CHAIR_i, {name}": rate.chair_i for name, rate in rates.items()},
    ), {name: rate.chair_i for name, rate in rates.items()}


def overhead(run: Run) -> Measured:
    """Processor time of writing with VHR over that of writing without, with as many image tokens as LLaVA-1.5 has."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    run.log("timing")
    torch.manual_seed(run.seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=192,
            patch_size=8, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=256, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        image_token_index=3, image_seq_length=576, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config).eval()
    words = torch.randint(8, 256, (1, 40), generator=torch.Generator().manual_seed(run.seed))
    inputs = {
        "input_ids": torch.cat([torch.tensor([[1]]), torch.full((1, 576), 3), words], 1),
        "pixel_values": torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(run.seed)),
    }

    def write(*edits: Any) -> Callable[[], Any]:
        def act() -> Any:
            with torch.no_grad(), steer(model, *edits):
                return model.generate(**inputs, max_new_tokens=OVERHEAD_TOKENS, do_sample=False)

        return act

    def twice() -> Any:
        twin = without(inputs, image_positions(model, inputs), model=model)
        with torch.no_grad():
            for given in (inputs, twin):
                model.generate(**given, max_new_tokens=OVERHEAD_TOKENS, do_sample=False)

    ways = {"plain": write(), "VHR": write(VisionAwareHeadReinforcement(ALPHA)), "contrast": twice}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    write()()
    for _ in range(OVERHEAD_RUNS):
        for name, act in ways.items():
            start = time.process_time()
            act()
            seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["VHR"], seconds["plain"], strict=True)]
    rival = float(np.median(np.array(seconds["contrast"]) / np.array(seconds["plain"])))
    ratio = float(np.median(ratios))
    low, high = bootstrap_interval(ratios, statistic=np.median, seed=run.seed)
    return Measured(
        measured=f"{ratio:.3f} times the processor time of plain writing ({min(ratios):.3f} to {max(ratios):.3f} in "
        f"{OVERHEAD_RUNS} pairs; 617 tokens read, {OVERHEAD_TOKENS} written)",
        control=f"running the model on the text alone as well, as contrastive decoding does: {rival:.2f} times",
        holds=ratio <= OVERHEAD,
        margin=OVERHEAD - ratio,
        interval=(OVERHEAD - high, OVERHEAD - low),
        values={"ratio": ratio, "ratio of contrastive decoding": rival},
    )


@torch.no_grad()
def identities(run: Run, one: Subject) -> dict[str, Measured]:
    """The exact facts, on the trained model."""
    run.log("identities")
    inputs = vision_language_inputs(one.other[:64])
    plain = one.model(**inputs).logits
    with steer(one.model, VisionAwareHeadReinforcement(1.0)):
        same = torch.equal(one.model(**inputs).logits, plain)
    edit = VisionAwareHeadReinforcement(ALPHA)
    with steer(one.model, edit):
        found = one.model(**inputs).logits
    assert edit.chosen is not None
    scale = torch.ones(edit.chosen.shape)
    for layer in LAYERS:
        with steer(one.model, ScaleHeads(scale=scale.clone())):
            part = vision_divergence(one.model, inputs, together=False)
        picked = aware_heads(part.divergence[:, layer], part.absent[:, layer].square())
        scale[:, layer] = torch.where(picked, ALPHA, 1.0)
    agree = float((edit.chosen == (scale > 1)).float().mean())
    at_once = vision_divergence(one.model, inputs).chosen()[:, list(LAYERS)]
    differ = float((edit.chosen[:, list(LAYERS)] != at_once).float().mean())
    with steer(one.model, ScaleHeads(scale=scale)):
        error = float((one.model(**inputs).logits - found).abs().max() / found.abs().max())
    folded = copy.deepcopy(one.model)
    single = {key: value[:1] for key, value in inputs.items()}
    for layer, chosen in enumerate(edit.chosen[0]):
        weight = folded.model.language_model.layers[layer].self_attn.o_proj.weight
        weight.mul_(torch.where(chosen, ALPHA, 1.0).repeat_interleave(weight.shape[1] // len(chosen)))
    fold = float((folded(**single).logits - found[:1]).abs().max() / found[:1].abs().max())
    return {
        "one-forward": Measured(
            measured=f"{agree:.2%} of the choices are those of separate forwards, logits within {error:.1e}; alpha 1 "
            f"{'is' if same else 'is not'} bit-identical",
            control=f"choosing all layers at once on the plain model differs in {differ:.1%} of the heads",
            holds=same and agree == 1 and error < 1e-5,
        ),
        "projection": Measured(
            measured=f"logits within {fold:.1e} of a model whose projection's columns were scaled instead",
            holds=fold < 1e-5,
        ),
    }


def sweep(run: Run, one: Subject) -> dict[str, dict[str, list[float]]]:
    """Typical words and ordinary accuracy by alpha, for the figure."""
    run.log("sweeping alpha")
    ways: dict[str, Callable[[float], setup.Arm]] = {
        "VHR": setup.reinforced,
        "all heads": lambda alpha: lambda part: (ScaleHeads(scale=alpha, heads=f"{LAYERS[0]}-{LAYERS[-1]}.*"),),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, way in ways.items():
        said = [(setup.told(one.model, one.other, way(a)), setup.told(one.model, one.ordinary, way(a))) for a in ALPHAS]
        found[name] = {
            "typical": [float(other.typical.mean()) for other, _ in said],
            "ordinary": [float(usual.right.mean()) for _, usual in said],
        }
    return found
