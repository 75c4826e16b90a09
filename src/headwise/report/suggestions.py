"""What a person can do with the heads that a probe found: sentences with the exact command."""

import shlex

__all__ = ["suggest"]

# Probe -> what can be done, and the edit or selection that does it. {top} is a selection of the strongest heads.
_IDEAS: dict[str, list[tuple[str, str]]] = {
    "sink": [
        (
            "These heads park their attention on the first token. Weaken that token and see what they look at instead:",
            "steer{model} --edit zero-tuning:gamma=0.5 --heads {top} --prompt {prompt}",
        ),
    ],
    "sinks": [
        (
            "These heads park their attention on a few columns. Remove them and see how little or how much changes:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
    ],
    "previous": [
        (
            "Previous-token heads feed the heads that copy. Remove them and watch repetition suffer:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
    ],
    "induction": [
        (
            "Induction heads continue what the text has said before. Remove them and see whether the model still can:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
        (
            "A fair control is as many random heads of the same layers:",
            "steer{model} --edit ablate --heads '{bare},random:{k},!{bare}' --prompt {prompt}",
        ),
    ],
    "retrieval": [
        (
            "Retrieval heads fetch facts from the context. Remove them and ask for what only the prompt says:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
    ],
    "duplicate": [
        (
            "These heads see that a token was there before. Remove them and compare:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
    ],
    "entropy": [
        (
            "High entropy means a broad look. The sharpest heads are at the other end; see what removing those does:",
            "steer{model} --edit ablate --heads {bottom} --prompt {prompt}",
        ),
    ],
    "distance": [
        (
            "These heads look far back. Remove them and see whether the model forgets how the text began:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
        (
            "The heads at the other end look only at their neighbours; compare:",
            "steer{model} --edit ablate --heads {bottom} --prompt {prompt}",
        ),
    ],
    "contribution": [
        (
            "These heads write the most. Halve what they write:",
            "steer{model} --edit scale-heads:scale=0.5 --heads {top} --prompt {prompt}",
        ),
        (
            "The heads that write the least are the first candidates to leave out:",
            "steer{model} --edit ablate --heads {bottom} --prompt {prompt}",
        ),
    ],
    "dormant": [
        (
            "Dormant heads do little on this text. Remove them; the answer should barely change:",
            "steer{model} --edit ablate --heads {top} --prompt {prompt}",
        ),
    ],
}
_IDEAS["induction-repeat"] = _IDEAS["induction"]
_OTHERWISE = [
    (
        "Remove the strongest heads and compare the two texts:",
        "steer{model} --edit ablate --heads {top} --prompt {prompt}",
    )
]


def suggest(
    probe: str, *, model: str = "", map_path: str = "", tower: str = "", k: int = 4, prompt: str = "The captain said"
) -> list[dict[str, str]]:
    """What to do with the k strongest heads of a probe: ``[{"do": sentence, "command": command, "tower": tower}]``.

    model: as it is given to the command line; empty is its default. map_path: a saved head map that the command reads
    the scores from; empty leaves that to the command.
    """
    prefix = f"{tower}:" if tower else ""
    bare = f"{prefix}top:{probe}:{k}"
    words = {
        "model": f" {shlex.quote(model)}" if model else "",
        "top": shlex.quote(bare),
        "bare": bare,
        "k": k,
        "bottom": shlex.quote(f"{prefix}bottom:{probe}:{k}"),
        "prompt": '"' + prompt.replace('"', "'") + '"',
    }
    ideas = []
    for sentence, pattern in _IDEAS.get(probe, _OTHERWISE):
        line = f"headwise {pattern}".format(**words)
        command = f"{line} --map {shlex.quote(map_path)}" if map_path else line
        ideas.append({"do": sentence, "command": command, "tower": tower})
    return ideas
