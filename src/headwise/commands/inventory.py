"""`--list`: what there is to choose from."""

from typing import Any

from headwise.commands.common import Output, document

__all__ = ["inventory", "show"]

SELECTION = (
    "3.1, 0-2.*, vision:*.0, all, top:PROBE:K, bottom:PROBE:K, PROBE>=X, PROBE<X, random:K[:SEED], "
    "@heads.json[#PROBE], !ITEM; joined by commas"
)


def inventory() -> dict[str, Any]:
    """Probes, edits with their parameters and defaults, key groups, specimens."""
    from headwise._edits import GROUPS, describe_edits
    from headwise.attend.probes import PROBES
    from headwise.heads.prompt_probe import prompt_probes
    from headwise.specimens.registry import specimen_checkpoints, specimen_summaries

    prompted = prompt_probes()
    probes = [
        {
            "name": name,
            "kind": cls.kind,
            "by_default": name in PROBES or cls.by_default,
            "meaning": cls.sentence,
        }
        for name, cls in {**PROBES, **prompted}.items()
    ]
    specimens = [
        {"name": name, "summary": summary, "checkpoints": specimen_checkpoints(name)}
        for name, summary in specimen_summaries().items()
    ]
    return document(
        probes=probes,
        edits=describe_edits(),
        groups=[{"form": form, "meaning": meaning} for form, meaning in GROUPS.items()],
        specimens=specimens,
        selection=SELECTION,
    )


def show(out: Output) -> None:
    """Print it, as one document or for a person."""
    found = inventory()
    if out.as_json:
        return out.write(found)
    print("Probes (--probe; * runs only when it is named, or with all)")
    for one in found["probes"]:
        print(f"  {one['name'] + ('' if one['by_default'] else ' *'):22} {one['meaning']}")
    print("\nEdits (--edit NAME:key=value,...)")
    for one in found["edits"]:
        print(f"  {one['name']:22} {one['summary']}")
        for parameter in one["parameters"]:
            default = "required" if parameter["required"] else f"default {_said(parameter['default'])}"
            if parameter["name"] not in ("heads", "when"):
                print(f"  {'':24}{parameter['name']} ({parameter['type']}): {default}")
    print(f"  {'':22} every edit also takes heads= (or --heads) and when=all, prompt or generated (or --when)")
    print("\nKey groups (--group, or group= in an edit)")
    for one in found["groups"]:
        print(f"  {one['form']:22} {one['meaning']}")
    print(f"\nHeads (--heads)\n  {found['selection']}")
    print("\nSpecimens (MODEL)")
    for one in found["specimens"]:
        print(f"  {one['name']:22} {one['summary']}")
        if one["checkpoints"]:
            steps = one["checkpoints"]
            print(f"  {'':24}{one['name']}@STEP: {len(steps)} checkpoints, {steps[0]:,} to {steps[-1]:,}")


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
