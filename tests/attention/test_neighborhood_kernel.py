"""The C++ kernel of neighbourhood attention: its answers and gradients, its threads, and when it is built and taken."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.neighborhoods import by_loops, cases, needs_cpp, options, tensors
from torch import Tensor

from headwise.attention import _neighborhood_cpp as cpp
from headwise.attention import (
    neighborhood_attention,
    neighborhood_backends,
)


@pytest.mark.parametrize("grid", [(90,), (23, 37), (6, 5, 40)])
@needs_cpp
def test_the_kernel_on_rows_that_fill_vectors(grid):
    """Shifted blocks, their overlap at the end, and borders whose rows share a vector, with and without strides, causal
    axes and a bias; sizes that are whole vectors and others."""
    for kernel, stride, dilation, causal in itertools.product((4, 7), (1, 3), (1, 2), (False, True)):
        window = tuple(min(kernel, n // dilation) for n in grid)
        step = tuple(min(stride, n) for n in window)
        sizes = (12, 10) if kernel == 4 else (32, 19)
        q, k, v = (x.float() for x in tensors(grid, 4, 2, *sizes))
        bias = torch.randn(4, *(2 * n - 1 for n in window))
        given_ = {"stride": step, "dilation": dilation, "is_causal": causal, "bias": bias}
        ours, theirs = (neighborhood_attention(q, k, v, window, backend=one, **given_) for one in ("cpp", "tiled"))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_cpp
def test_the_kernel_shares_its_work_among_threads():
    q, k, v = (x.float() for x in tensors((40, 40), 4, 2))
    one = neighborhood_attention(q, k, v, 7, backend="cpp")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(neighborhood_attention(q, k, v, 7, backend="cpp"), one)
    finally:
        torch.set_num_threads(before)


def kernels_gradients(backend: str, *tensors_: Tensor, kernel, **given_) -> list[Tensor]:
    """Of a loss that reads outputs and log-sum-exp, for q, k, v and, where there is one, the bias."""
    dtype = torch.float32 if backend == "cpp" else torch.float64
    q, k, v, *bias = leaves = [x.detach().to(dtype).requires_grad_() for x in tensors_]
    given_ |= {"bias": bias[0]} if bias else {}
    out, lse = neighborhood_attention(q, k, v, kernel, backend=backend, return_lse=True, **given_)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum() + lse.square().sum()
    return list(torch.autograd.grad(loss, leaves))


def same_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6 * float(theirs.abs().max()), rtol=1e-5)


@given(cases(), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.booleans())
@settings(max_examples=60, deadline=None)
@needs_cpp
def test_the_kernels_gradients_equal_the_definitions_in_double_precision(axes, heads, with_bias):
    grid, kernel, given_ = options(axes)
    inputs = tensors(grid, *heads, size=5, e=6)
    if with_bias:
        inputs.append(torch.randn(heads[0], *(2 * n - 1 for n in kernel), dtype=torch.float64))
    found, expected = (kernels_gradients(one, *inputs, kernel=kernel, **given_) for one in ("cpp", "reference"))
    same_gradients(found, expected)


@pytest.mark.parametrize("grid", [(90,), (23, 37), (6, 5, 40)])
@needs_cpp
def test_the_kernels_gradients_on_rows_that_fill_vectors(grid):
    """Shifted blocks, their overlap (whose queries may count once), and borders, as in the forward's test."""
    for kernel, stride, dilation, causal in itertools.product((4, 7), (1, 3), (1, 2), (False, True)):
        window = tuple(min(kernel, n // dilation) for n in grid)
        step = tuple(min(stride, n) for n in window)
        inputs = tensors(grid, 4, 2, *((12, 10) if kernel == 4 else (32, 19)))
        inputs.append(torch.randn(4, *(2 * n - 1 for n in window), dtype=torch.float64))
        given_ = {"stride": step, "dilation": dilation, "is_causal": causal}
        found, expected = (kernels_gradients(one, *inputs, kernel=window, **given_) for one in ("cpp", "tiled"))
        same_gradients(found, expected)


@pytest.mark.parametrize("rule", [(3, 1, 1, False), (4, 2, 1, False), (3, 1, 2, True)])
@needs_cpp
def test_the_kernels_gradients_are_slopes_of_the_loops(rule):
    """Along a random direction, by differences of the brute force in double precision, on rows of 21 with a bias."""
    kernel, stride, dilation, causal = rule
    rules = [(2, 1, 1, False), rule]
    inputs = [*tensors((3, 21), 2, 1, 6, 5), torch.randn(2, 3, 2 * kernel - 1, dtype=torch.float64)]
    upstream = torch.randn(2, 3, 21, 2, 5, dtype=torch.float64)
    directions = [torch.randn_like(x) for x in inputs]
    sides = []
    for step in (1e-5, -1e-5):
        q, k, v, bias = (x + step * one for x, one in zip(inputs, directions, strict=True))
        sides.append((by_loops(q, k, v, rules, bias) * upstream).sum())
    slope = (sides[0] - sides[1]) / 2e-5
    q, k, v, bias = leaves = [x.float().requires_grad_() for x in inputs]
    out = neighborhood_attention(
        q, k, v, (2, kernel), stride=(1, stride), dilation=(1, dilation), is_causal=(False, causal), bias=bias,
        backend="cpp",
    )  # fmt: skip
    assert isinstance(out, Tensor)
    found = torch.autograd.grad((out * upstream).sum(), leaves)
    along = sum((x.double() * one).sum() for x, one in zip(found, directions, strict=True))
    torch.testing.assert_close(along, slope, atol=1e-4, rtol=1e-4)


@needs_cpp
def test_the_kernels_gradients_do_not_depend_on_threads():
    """More threads than pairs of batch and head: the parts of a pair are added up."""
    inputs = [*tensors((11, 40), 2, 1), torch.randn(2, 9, 9, dtype=torch.float64)]
    one = kernels_gradients("cpp", *inputs, kernel=5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        many = kernels_gradients("cpp", *inputs, kernel=5)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(many, one, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6 * float(theirs.abs().max()), rtol=1e-5)


@needs_cpp
def test_the_kernels_backward_is_the_one_that_runs(monkeypatch):
    calls = []
    run = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *args: calls.append(1) or run(*args))
    kernels_gradients("cpp", *tensors((9, 9)), kernel=3)
    kernels_gradients("tiled", *tensors((9, 9)), kernel=3)
    assert calls == [1]


WHEN = """
import sys, torch
from pathlib import Path
from headwise.attention import neighborhood as n
def chosen(length):
    q = torch.zeros(1, 4, length, length, 8)
    return n._choose("auto", q, q, None, n.axes_of((length, length), 7))
def built():
    return len([*Path(sys.argv[1]).rglob("*.so")])
print(chosen(14), built(), chosen(28), built(), chosen(14), n._choose("auto", torch.zeros(1, 1, 7, 1).double(),
      torch.zeros(1, 1, 7, 1), None, n.axes_of((7,), 3)))
"""


@needs_cpp
def test_small_calls_use_a_kernel_that_is_there_and_build_none(tmp_path):
    """The first small call finds none, a large one builds it, and every call after that, of a later process too, takes
    it."""
    for found in ("tiled 0 cpp 1 cpp tiled", "cpp 1 cpp 1 cpp tiled"):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-c", WHEN, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found


def test_the_kernel_can_be_turned_off_and_says_why(tmp_path):
    code = "import headwise.attention as a; print(a.neighborhood_backends()['cpp'])"

    def reason(**change: str) -> str:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **change}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert reason(HEADWISE_CPP="0") == "HEADWISE_CPP is 0"
    nothing = reason(PATH="", CXX="", HEADWISE_CPP="1", XDG_CACHE_HOME=str(tmp_path))
    assert nothing == "no C++ compiler was found (CXX, g++, clang++)"
    assert set(neighborhood_backends()) == {"reference", "tiled", "cpp", "flex", "natten"}
