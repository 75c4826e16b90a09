"""An area without objects gives no cases: neither a failure nor a skip."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def empty(item: pytest.Item) -> bool:
        reasons = [str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skip")]
        return any(reason.startswith("got empty parameter set") for reason in reasons)

    gone = [item for item in items if empty(item)]
    if gone:
        items[:] = [item for item in items if not empty(item)]
        config.hook.pytest_deselected(items=gone)
