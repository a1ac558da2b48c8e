"""Triton's kernels without a GPU: interpreted they give the numbers of the head, on the pretend GPU within a step, and the compiler that
comes with Triton makes machine code of them for each kind of GPU. How fast they are only a GPU can say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_gpu import CACHE, IMPOSSIBLE, ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(IMPOSSIBLE is not None, reason=str(IMPOSSIBLE))]

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlinf.kernels import head_triton as h

ROW = dict.fromkeys(("top", "sums", "lse", "entropy", "by_logit", "by_entropy", "by_temperature"), "*fp32")
KINDS = ROW | {"columns": "*i64", "mine": "*i1", "n_rows": "i32", "n_columns": "i32", "valid": "i32", "by_temperature": "fp32"}
for capability in (80, 90, 100):  # A100, H100 and H200, B200
    for logits in ("*bf16", "*fp16", "*fp32"):
        for kernel, fixed in (
            (h._sums_kernel, {}), (h._gradient_kernel, {"HAS_ENTROPY": True}), (h._gradient_kernel, {"HAS_ENTROPY": False}),
        ):
            fixed = fixed | {"BLOCK": h.BLOCK}
            signature = {n: "constexpr" if n in fixed else logits if n == "logits" else KINDS[n] for n in kernel.arg_names}
            source, target = ASTSource(kernel, signature, constexprs=fixed), GPUTarget("cuda", capability, 32)
            made = triton.compile(source, target=target, options={"num_warps": h.WARPS})
            print(capability, logits, len(made.asm["cubin"]))
"""


def triton() -> Path:
    """The version that is pinned for GPUs, from the package index: 200 MB once."""
    pinned = re.search(r"^triton==(\S+)", (ROOT / "requirements/gpu.lock").read_text(), re.M)[1]
    folder = CACHE / f"triton-{pinned}"
    if not folder.exists():
        unfinished = folder.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(unfinished), f"triton=={pinned}"], check=True
        )
        unfinished.rename(folder)
    return folder


def run(words: list[str], variables: dict[str, str], interpreted: bool = True) -> str:
    path = os.pathsep.join([variables.get("PYTHONPATH", str(ROOT)), str(triton())])
    variables = variables | {"PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    done = subprocess.run([sys.executable, *words], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_interpreted_they_pass_the_tests_of_the_head() -> None:
    said = run(["-m", "pytest", "-n", "0", "-rs", "rlinf/kernels/head_triton_test.py"], dict(os.environ))
    assert "SKIPPED" not in said and "6 passed" in said, said[-2000:]


def test_an_actor_on_the_pretend_gpu_uses_them() -> None:
    tests = ["tests/gpu/test_training.py", "-k", "chunks_of_logits or shared_prompt or 16_bits", "-m", "gpu"]
    watched = (
        "import sys, pytest; from rlinf.training import logprobs; code = pytest.main(sys.argv[1:]); "
        "assert logprobs._triton_kernels.cache_info().hits; sys.exit(code)"
    )
    run(["-c", watched, "-n", "0", *tests], environment())


def test_they_compile_for_every_kind_of_gpu(tmp_path: Path) -> None:
    said = run(["-c", COMPILE], dict(os.environ) | {"TRITON_CACHE_DIR": str(tmp_path)}, interpreted=False)
    assert len(said.splitlines()) == 27 and all(int(line.split()[-1]) > 1000 for line in said.splitlines())
