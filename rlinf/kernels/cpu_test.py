"""Our compiled code against torch, each variant that this CPU can run, and the way without it."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rlinf.hardware import cpu_flags
from rlinf.kernels import cpu, rowwise
from rlinf.kernels.cpu import EXPONENT, RUN, VARIANTS, Kernels, kernels, made_of
from rlinf.weights.scan import scan_by_numpy

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
    library, changed = Kernels(RUNNABLE[0]).library, tmp_path / "cpu"
    shutil.copytree(cpu.SOURCES, changed)
    assert made_of(library, cpu.SOURCES) and made_of(library, changed)
    with (changed / "vectors.h").open("a") as header:
        header.write("\n")
    assert not made_of(library, changed)
    assert made_of(library, tmp_path / "none")  # a wheel has no source
    assert not made_of(ctypes.CDLL(None), cpu.SOURCES)  # an older library has no number


@pytest.mark.parametrize("why", [PermissionError, FileNotFoundError])
def test_where_the_best_is_not_allowed_or_was_not_compiled_the_next_is_taken(monkeypatch: pytest.MonkeyPatch, why: type[OSError]) -> None:
    def refuse(name: str) -> str:
        if name == RUNNABLE[0]:
            raise why("not here")
        return name

    monkeypatch.setattr(cpu, "Kernels", refuse)
    assert kernels.__wrapped__() == (RUNNABLE[1] if len(RUNNABLE) > 1 else None)


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


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 16), (16, 32), (17, 33), (130, 70), (131, 1536), (960, 576), (7, 3)])
def test_a_product_of_bf16_numbers_is_summed_in_fp32_and_rounded_once(compiled: Kernels, outputs: int, inputs: int) -> None:
    torch.manual_seed(outputs)
    weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16(), torch.randn(outputs)
    for rows in (1, 2, 5, 6, 7, 15, 16, 17, 33, 64, 129):
        x = torch.randn(rows, inputs).bfloat16()
        exact = F.linear(x.double(), weight.double(), bias.double())
        whole = compiled.linear(x, weight, bias)
        assert whole.dtype == torch.float32 and (whole - exact).abs().max() < 2e-5
        assert (compiled.linear(x, weight) - (exact - bias)).abs().max() < 2e-5
        assert torch.equal(compiled.linear(x, weight, bias, torch.bfloat16), whole.bfloat16())
        assert torch.equal(compiled.linear(x[: rows // 2 + 1], weight, bias), whole[: rows // 2 + 1])


def test_a_product_of_bf16_numbers_does_not_disturb_those_of_torch(compiled: Kernels) -> None:
    """Both configure the tiles of a thread."""
    torch.manual_seed(0)
    x, weight = torch.randn(96, 320).bfloat16(), torch.randn(160, 320).bfloat16()
    theirs, ours = F.linear(x, weight), compiled.linear(x, weight, None, torch.bfloat16)
    for _ in range(3):
        assert torch.equal(compiled.linear(x, weight, None, torch.bfloat16), ours) and torch.equal(F.linear(x, weight), theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (4, 32), (7, 128), (8, 96), (6, 256)])
def test_a_decode_step_attends_to_what_is_in_the_cache_and_to_itself(
    compiled: Kernels, group: int, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(group)
    slots, heads, capacity, positions = 5, 2, 160, torch.tensor([0, 159, 63, 64, 100])
    caches = torch.randn(2, slots + 1, heads, capacity, dim).to(dtype)
    queries, keys, values = torch.randn(slots, heads * (group + 2), dim).to(dtype).split([heads * group, heads, heads], 1)
    expected = caches.clone()
    for slot, position in enumerate(positions):
        expected[0, slot, :, position], expected[1, slot, :, position] = keys[slot], values[slot]
    caches[:, torch.arange(slots), :, positions] = float("nan")  # where the new ones go nothing is read before
    for slot, position in enumerate(positions):
        caches[1, slot, :, position + 1 :] = float("nan")  # and nothing behind
        expected[1, slot, :, position + 1 :] = float("nan")
    out = compiled.decode_attention(queries, keys, values, caches, positions, dim**-0.5)
    assert torch.equal(caches.nan_to_num(7.0), expected.nan_to_num(7.0))
    for slot, position in enumerate(positions):
        query = queries[slot].view(heads, group, dim).double()
        k, v = (expected[part, slot, :, : position + 1].double() for part in (0, 1))
        exact = (query @ k.transpose(1, 2) * dim**-0.5).softmax(-1) @ v
        assert (out[slot].view(heads, group, dim) - exact).abs().max() < tolerance * exact.abs().max()
    alone = compiled.decode_attention(queries[2:3], keys[2:3], values[2:3], expected[:, 2:3].contiguous(), positions[2:3], dim**-0.5)
    assert torch.equal(alone[0], out[2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("width", [16, 17, 31, 96, 576])
def test_rows_and_their_gradients_are_those_of_torch(
    compiled: Kernels, monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(width)
    monkeypatch.setattr(rowwise, "kernels_for", lambda *_: compiled)
    turns = torch.rand(37, width) * 6

    def both_halves(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], -1)

    cases: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
        "norm": (lambda x, w: rowwise.rms_norm(x, w, 1e-5), [torch.randn(37, width) * 3, torch.randn(width)]),
        "swiglu": (rowwise.swiglu, [torch.randn(37, 2 * width) * 4]),
        "rotate": (
            lambda x: rowwise.rotate(x, both_halves(turns.cos()).to(x.dtype), both_halves(turns.sin()).to(x.dtype)),
            [torch.randn(37, 3, 2 * width)],
        ),
    }
    for name, (function, inputs) in cases.items():
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*inputs)
        grad = torch.randn(out.shape).to(dtype)
        found = (out, *torch.autograd.grad(out, inputs, grad))
        with torch.no_grad():
            assert torch.equal(function(*inputs), out)
        with monkeypatch.context() as plain:
            plain.setattr(rowwise, "kernels_for", lambda *_: None)
            exact = [x.detach().double().requires_grad_() for x in inputs]
            expected = function(*exact)
            for a, b in zip(found, (expected, *torch.autograd.grad(expected, exact, grad.double())), strict=True):
                assert a.dtype == dtype and (a - b).abs().max() < tolerance * b.abs().max().clamp(min=1), name


def test_the_gradient_of_a_norm_does_not_depend_on_the_number_of_threads(compiled: Kernels) -> None:
    torch.manual_seed(0)
    x, weight, grad, scale = torch.randn(700, 576), torch.randn(576), torch.randn(700, 576), torch.empty(700)
    compiled.norm(x, weight, 1e-5, scale)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compiled.norm_back(x, weight, scale, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("length", "size"), [(1, 1), (5, 5), (7, 40), (33, 64)])
def test_softmax_of_causal_attention_and_its_gradient(
    compiled: Kernels, length: int, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(size)
    scores, grad = (torch.randn(2, 3 * length, size).mul(4).to(dtype) for _ in range(2))
    hidden = torch.full((length, size), float("-inf"), dtype=torch.float64).triu(size - length + 1).repeat(3, 1)
    exact = scores.double().requires_grad_()
    weights = (exact * 0.3 + hidden).softmax(-1)
    found = scores.clone()
    compiled.softmax(found, length, 0.3)
    assert (found - weights).abs().max() < tolerance and not found[:, hidden.isinf()].any()
    (expected,) = torch.autograd.grad(weights, exact, grad.double())
    compiled.softmax_back(weights.detach().to(dtype), grad, length, 0.3)
    assert (grad - expected).abs().max() < tolerance * 4


@pytest.mark.parametrize("function", ["head_top", "head_sums", "head_back", "softmax", "norm", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(compiled: Kernels, function: str, dtype: torch.dtype) -> None:
    for at in (0, 20, 34):  # in a whole vector, and behind the last
        x = torch.randn(3, 36).to(dtype)
        x[1, at] = float("nan")
        one = torch.ones(3)
        columns = torch.zeros(3, 1, dtype=torch.int64)
        found = {
            "head_top": lambda x: compiled.head_top(x, 35)[:, None],
            "head_sums": lambda x: compiled.head_sums(x, columns, one, 1.0, 35).t(),
            "head_back": lambda x: compiled.head_back(x, columns, one.bool(), one, one, one, None, 1.0, 35) or x,
            "softmax": lambda x: compiled.softmax(x[None], 1, 1.0) or x,
            "norm": lambda x: compiled.norm(x, torch.ones(36, dtype=dtype), 1e-5),
            "silu": compiled.silu,
        }[function](x)
        assert found[1].isnan().any() and found[::2].isfinite().all()


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
def test_a_scan_copies_and_sums(content: bytes, first: int, shift: int) -> None:
    source = np.frombuffer(bytes(shift) + content, np.uint8)[shift:]
    for scan in (*(Kernels(name).scan for name in RUNNABLE), scan_by_numpy):
        to = np.full(shift + len(content) + 64, 7, np.uint8)
        run = a_run(source, first, to=to[shift:])
        scan(run)
        assert run["sum"][0] == sum_of_words(content, first)
        assert to[shift : shift + len(content)].tobytes() == content and (to[:shift] == 7).all() and (to[shift + len(content) :] == 7).all()


def test_a_sum_of_many_words_is_that_of_its_parts(compiled: Kernels) -> None:
    content = np.random.default_rng(0).integers(0, 256, (1 << 20) + 12, np.uint8)
    content[:4096] = 255
    expected = sum_of_words(content.tobytes(), 5)
    cut = 4 * 77_777
    for scan in (compiled.scan, scan_by_numpy):
        runs = np.concatenate([a_run(content[:cut], 5), a_run(content[cut:], 5 + cut // 4)])
        scan(runs)
        assert runs["sum"].sum(dtype=np.uint64) == expected


@pytest.mark.parametrize("dtype", EXPONENT)
@pytest.mark.parametrize("size", [1, 2, 15, 16, 64, 203])
def test_one_value_that_is_not_finite_is_found_in_a_run(compiled: Kernels, dtype: torch.dtype, size: int) -> None:
    size += size % 2
    largest = torch.full((size,), torch.finfo(dtype).max).to(dtype)
    largest[1::2] *= -1
    for value, not_finite in ((None, 0), (float("inf"), 1), (float("-inf"), 1), (float("nan"), 1)):
        for at in {0, 1, size // 2, size - 1}:
            tensor = largest.clone()
            if value is not None:
                tensor[at] = value
            run = a_run(tensor.view(torch.uint8).numpy(), dtype=dtype)
            compiled.scan(run)
            assert run["not_finite"][0] == not_finite
    run = a_run(torch.full((size,), float("nan"), dtype=dtype).view(torch.uint8).numpy())  # bytes of no type
    compiled.scan(run)
    assert run["not_finite"][0] == 0
