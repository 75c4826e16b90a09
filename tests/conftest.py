"""Every test runs offline, on one thread, from a fixed seed, with uninitialised memory made visible."""

import os
import random
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Before torch and transformers are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
if "HEADWISE_DATA" not in os.environ and (ROOT.parent / "shared" / "data").is_dir():
    os.environ["HEADWISE_DATA"] = str(ROOT.parent / "shared" / "data")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

settings.register_profile(
    "default",
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same examples in every run: a failure seen once is seen again
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")
torch.set_num_threads(1)
_device_constructors()  # torch remembers them at the first `with torch.device(...)`: before they are poisoned


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its relatives come filled with NaN, so that a forgotten write shows."""

    def poison(function):
        def filled(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if not tensor.is_floating_point():
                return tensor
            with torch.no_grad():  # a leaf that requires a gradient may be written only so
                return tensor.fill_(float("nan"))

        return filled

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections leave this machine in no test; the loopback stays, a browser is driven through it."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address):
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {host}: tests are offline")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
