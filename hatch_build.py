"""Recorded runs travel inside a built package, so that an installed copy knows what works.

An editable install reads them in the source tree instead, hence a hook and not a fixed rule.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShipResults(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"]["results"] = "headwise/_results"
