"""Our compiled code against torch, each variant that this CPU can run, and the way without it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rlinf import cpu_kernels
from rlinf.cpu_kernels import EXPONENT, RUN, VARIANTS, Kernels, kernels, made_of
from rlinf.hardware import cpu_flags
from rlinf.weights.buckets import look_by_numpy

RUNNABLE = [name for name, needed in VARIANTS.items() if needed <= cpu_flags()]
pytestmark = pytest.mark.skipif(not RUNNABLE, reason="needs an x86-64 CPU with AVX2")


@pytest.fixture(params=RUNNABLE)
def compiled(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param)


def test_the_best_variant_that_the_cpu_has_was_installed() -> None:
    assert kernels() is not None
    for name in RUNNABLE:
        Kernels(name)


def test_code_that_was_compiled_from_another_source_is_not_called(tmp_path: Path) -> None:
    source = Path(cpu_kernels.__file__).with_name("cpu_kernels.c")
    changed, library = tmp_path / "cpu_kernels.c", Kernels(RUNNABLE[0]).library
    changed.write_bytes(source.read_bytes() + b"\n")
    assert made_of(library, source) and not made_of(library, changed)
    assert made_of(library, tmp_path / "none.c")  # a wheel has no source
    assert not made_of(ctypes.CDLL(None), source)  # an older library has no number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(4, 16), (5, 33), (130, 70), (131, 1536), (960, 576), (7, 3)])
def test_a_product_is_that_of_torch(compiled: Kernels, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs).to(dtype) / inputs**0.5, torch.randn(outputs)
    for rows in (1, 2, 3, 4, 5, 6, 7, 12, 13, 64, 129):
        x = torch.randn(rows, inputs)
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert (compiled.linear(x, weight, bias) - exact).abs().max() < 1e-5
        assert (compiled.linear(x, weight) - (exact - bias)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads(compiled: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, 203), torch.randn(901, 203).to(dtype)
    whole = compiled.linear(x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, before):
            torch.set_num_threads(threads)
            assert all(torch.equal(compiled.linear(x[:n], weight), whole[:n]) for n in range(1, 70, 3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(compiled.linear(x.t().contiguous().t()[3:9], weight), whole[3:9])  # rows that do not lie side by side


def test_more_threads_than_parts_and_one_part(compiled: Kernels) -> None:
    x, weight = torch.randn(3, 8), torch.randn(9, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        assert torch.allclose(compiled.linear(x, weight), x @ weight.t(), atol=1e-5)
    finally:
        torch.set_num_threads(before)


def a_run(content: np.ndarray, first: int = 0, dtype: torch.dtype = torch.uint8, to: np.ndarray | None = None) -> np.ndarray:
    run = np.zeros(1, RUN)
    run["source"], run["nbytes"], run["first"] = content.ctypes.data, content.nbytes, first
    run["to"] = 0 if to is None else to.ctypes.data
    run["exponent"], run["unit"] = EXPONENT.get(dtype, (0, 0))
    return run


def sum_of_words(content: bytes, first: int) -> int:
    words = np.frombuffer(content + bytes(-len(content) % 4), np.uint32).tolist()
    return sum((2 * (first + i) + 1) * word for i, word in enumerate(words)) % 2**64


@given(st.binary(max_size=600), st.sampled_from([0, 1, 1 << 20, (1 << 33) + 7]), st.integers(0, 70))
@settings(deadline=None)
def test_a_look_copies_and_sums(content: bytes, first: int, shift: int) -> None:
    source = np.frombuffer(bytes(shift) + content, np.uint8)[shift:]
    for look in (*(Kernels(name).look for name in RUNNABLE), look_by_numpy):
        to = np.full(shift + len(content) + 64, 7, np.uint8)
        run = a_run(source, first, to=to[shift:])
        look(run)
        assert run["sum"][0] == sum_of_words(content, first)
        assert to[shift : shift + len(content)].tobytes() == content and (to[:shift] == 7).all() and (to[shift + len(content) :] == 7).all()


def test_a_sum_of_many_words_is_that_of_its_parts(compiled: Kernels) -> None:
    content = np.random.default_rng(0).integers(0, 256, (1 << 20) + 12, np.uint8)
    content[:4096] = 255
    expected = sum_of_words(content.tobytes(), 5)
    cut = 4 * 77_777
    for look in (compiled.look, look_by_numpy):
        runs = np.concatenate([a_run(content[:cut], 5), a_run(content[cut:], 5 + cut // 4)])
        look(runs)
        assert runs["sum"].sum(dtype=np.uint64) == expected


@pytest.mark.parametrize("dtype", EXPONENT)
@pytest.mark.parametrize("size", [1, 2, 15, 16, 64, 203])
def test_one_value_that_is_not_finite_spoils_a_run(compiled: Kernels, dtype: torch.dtype, size: int) -> None:
    size += size % 2
    largest = torch.full((size,), torch.finfo(dtype).max).to(dtype)
    largest[1::2] *= -1
    for value, spoiled in ((None, 0), (float("inf"), 1), (float("-inf"), 1), (float("nan"), 1)):
        for at in {0, 1, size // 2, size - 1}:
            tensor = largest.clone()
            if value is not None:
                tensor[at] = value
            run = a_run(tensor.view(torch.uint8).numpy(), dtype=dtype)
            compiled.look(run)
            assert run["spoiled"][0] == spoiled
    run = a_run(torch.full((size,), float("nan"), dtype=dtype).view(torch.uint8).numpy())  # bytes of no type
    compiled.look(run)
    assert run["spoiled"][0] == 0
