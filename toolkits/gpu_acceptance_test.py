"""The acceptance of a GPU machine: a rehearsal of every part on CPU, what it says of parts that fail, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlinf.checks import acceptance
from rlinf.checks.acceptance import LIMITS, Result, page, run_part
from rlinf.checks.acceptance_parts import judge_tests

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "toolkits" / "gpu_acceptance.sh"
MACHINE = {"device": "a GPU", "rehearsal": False, "platform": "p", "python": "3", "time": "now"}


def run(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    return subprocess.run(["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=timeout, env=env)


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    done = run("--cpu", "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    parts = {p["part"]: p for p in told["parts"]}
    assert list(parts) == list(LIMITS) and told["machine"]["device"] == "CPU"
    assert {name: p["status"] for name, p in parts.items() if name != "doctor"} == dict.fromkeys(
        [n for n in LIMITS if n != "doctor"], "ok"
    ), done.stdout
    assert done.returncode == (0 if parts["doctor"]["status"] == "ok" else 1)  # this machine may have too small a disk
    figures = {name: p["figures"] for name, p in parts.items()}
    assert figures["tests"]["failures"] == figures["tests"]["errors"] == 0 and figures["tests"]["tests"] > 10
    assert "skipped: needs a CUDA device; this machine has none" in parts["tests"]["remark"] and parts["tests"]["remark"] in done.stdout
    assert figures["parity"]["cases"] == 3 and figures["parity"]["loss"] <= 1e-6
    assert figures["run"]["steps"] == 3 and figures["run"]["engine"] == "embedded" and figures["run"]["backend"] == "local"
    assert [row["tokens"] for row in figures["trainer"]["rows"]] == [64, 128] and all(
        row["tokens_per_second"] > 0 for row in figures["trainer"]["rows"]
    )
    assert figures["sync"]["copy on the device"] > 0
    for place in ("shared memory", "buckets on the device"):
        assert figures["sync"][f"whole sync by {place}"] > 0 and max(figures["sync"][f"probe_gaps by {place}"]) <= 1e-4
    text = (tmp_path / "out" / "acceptance.md").read_text()
    assert "says nothing about a GPU" in text and "| tiny | 64 |" in text and "whole sync" in text


def part_script(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Run `code` in place of a part."""
    (folder / "fake.py").write_text(code)
    real = subprocess.Popen
    monkeypatch.setattr(
        acceptance.subprocess, "Popen", lambda command, **how: real([sys.executable, str(folder / "fake.py"), *command[3:]], **how)
    )


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("import sys; print('a crash'); sys.exit(3)", "failed", "exit code 3"),
        ("import time; print('asleep', flush=True); time.sleep(60)", "timed out", "not done after 1 s"),
        ("import json, sys; open(sys.argv[2] + '/sync.json', 'w').write(json.dumps({'a': 1.0, 'problem': 'slow'}))", "failed", "slow"),
        ("import json, sys; open(sys.argv[2] + '/sync.json', 'w').write(json.dumps({'a': 1.0, 'remark': 'x'}))", "ok", "x"),
    ],
    ids=["crash", "hang", "problem", "good"],
)
def test_a_part_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, status: str, words: str) -> None:
    part_script(monkeypatch, tmp_path, code)
    result = run_part("sync", tmp_path, [], 1 if status == "timed out" else 60)
    assert (result.status, result.problem or result.remark, result.verdict) == (status, words, f"{status}: {words}")
    text = page([result], MACHINE)
    assert ("the end of its log" in text) == (status != "ok") and f"| sync | {status}: {words} |" in text


def test_the_other_parts_run_when_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def fake(part: str, folder: Path, words: list[str], limit: float) -> Result:
        asked.append(part)
        return Result(part, "failed" if part == "parity" else "ok", 1.0, {}, "differs" if part == "parity" else "")

    monkeypatch.setattr(acceptance, "run_part", fake)
    assert acceptance.main(["--cpu", "--out", str(tmp_path)]) == 1
    assert asked == list(LIMITS) and "parity      1 s  failed: differs" in capsys.readouterr().out


NO_SGLANG, NO_GPU = "could not import 'sglang'", "needs a CUDA device; this machine has none"


@pytest.mark.parametrize(
    ("passed", "failed", "skipped", "cpu", "kind", "told"),
    [
        (40, 0, {}, False, "remark", "40 passed"),
        (36, 0, {NO_SGLANG: 4, "needs two GPUs": 1}, False, "remark", f"36 passed, 5 skipped: {NO_SGLANG} (4); needs two GPUs (1)"),
        (1, 0, {NO_GPU: 30}, False, "problem", f"1 passed, 30 skipped: {NO_GPU} (30)"),
        (1, 0, {NO_GPU: 30}, True, "remark", f"1 passed, 30 skipped: {NO_GPU} (30)"),
        (0, 0, {}, False, "problem", "0 passed"),
        (39, 1, {}, True, "problem", "39 passed, 1 failed"),
    ],
    ids=["all", "some skipped", "most skipped", "a rehearsal", "none", "one failed"],
)
def test_tests_that_were_skipped_are_told_and_are_no_proof_of_a_gpu(
    passed: int, failed: int, skipped: dict[str, int], cpu: bool, kind: str, told: str, tmp_path: Path
) -> None:
    cases = ["<testcase/>"] * passed + ["<testcase><failure/></testcase>"] * failed
    cases += [f'<testcase><skipped message="{why}"/></testcase>' for why, count in skipped.items() for _ in range(count)]
    counts = f'tests="{len(cases)}" failures="{failed}" errors="0" skipped="{sum(skipped.values())}"'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite {counts}>{''.join(cases)}</testsuite></testsuites>")
    found = judge_tests(tmp_path / "tests.xml", 1 if failed else 0, cpu)
    assert found["passed"] == passed and {name: found[name] for name in ("problem", "remark") if name in found} == {kind: told}


def test_the_page_has_the_figures_and_what_did_not_fit() -> None:
    row: dict[str, Any] = {"shape": "0.6B", "tokens": 16384, "tokens_per_second": 15000.0, "seconds": 2.2, "mfu": 0.141, "peak_gib": 12.0}
    text = page([Result("trainer", "ok", 9.0, {"rows": [row, {"shape": "1.5B", "tokens": 32768, "error": "out of memory"}]})], MACHINE)
    assert (
        "| 0.6B | 16,384 | 15,000 | 14.1 % | 2.20 | 12.0 |" in text and "| 1.5B | 32,768 | out of memory |" in text and "prime-rl" in text
    )


def test_what_cannot_begin_is_refused_with_the_reason(tmp_path: Path) -> None:
    from rlinf import device

    for words, expected in ((("--wheels", tmp_path / "none"), "--wheels wants a folder"), (("--wheels", tmp_path), "holds no wheel")):
        refused = run(*words)
        assert refused.returncode == 2 and expected in refused.stderr
    if not device.usable():
        refused = run("--out", tmp_path)
        assert refused.returncode == 2 and "torch finds no GPU here" in refused.stderr
