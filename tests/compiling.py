"""A module compiled by inductor against the module itself, in a process of its own.

The shape checks that pytest puts around headwise's functions, and the uninitialised memory that it fills with NaN, are
Python that the compiler would be led through: a user has neither, and the child process has neither.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["assert_compiles"]

CHILD = """
import sys
import torch

module, inputs, fullgraph = torch.load(sys.argv[1], weights_only=False)
compiled = torch.compile(module, fullgraph=fullgraph)


def outputs_and_gradients(function):
    given = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    out = function(*given)
    out.square().mean().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [out.detach(), *(x.grad for x in given), *gradients]


for have, want in zip(outputs_and_gradients(compiled), outputs_and_gradients(module), strict=True):
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)
with torch.no_grad():
    torch.testing.assert_close(compiled(*inputs), module(*inputs), atol=1e-5, rtol=1e-4)
"""


def assert_compiles(module: nn.Module, *inputs: Tensor, fullgraph: bool = False) -> None:
    """Compiled, a module gives the same output, with and without gradients, and the same gradients.

    fullgraph: a graph break fails, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt"
        torch.save((module, inputs, fullgraph), path)
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(path)]
        # What was compiled before is kept by the forward's graph, and calls a backward as it was then.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
