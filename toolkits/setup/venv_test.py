"""toolkits/setup/venv.sh with stand-ins for Python and pip: which Python it takes, what it installs, how it waits for another set-up."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-c "*"(3, 10)"*) [[ {version} < 3.14 ]];;
  "-c "*"(3, 12)"*) [[ {version} == 3.12 ]];;
  "-c "*purelib*) echo /site-packages;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/rlinf"; chmod +x "$3/bin/rlinf";;
  "-m compileall") echo "{version} $*" >>{log};;
  "-m pip") echo "{version} $*" >>{log}; echo "$CPATH" >{log}.headers;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script and what it reads, with room for Pythons that come first on the PATH."""
    for name in ("setup.py", "requirements", "rlinf/kernels/c", "toolkits/setup/venv.sh"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python", "python3.10", "python3.11", "python3.12", "python3.13"):
        plant(tmp_path, name, "3.14")
    return tmp_path


def plant(checkout: Path, name: str, version: str) -> None:
    file = checkout / "bin" / name
    file.write_text(PYTHON.format(version=version, log=checkout / "log"))
    file.chmod(0o755)


def set_up(checkout: Path, device: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "RLINF_DEVICE": device} | variables
    return subprocess.run(["bash", str(checkout / "toolkits/setup/venv.sh"), *words], env=env, capture_output=True, text=True, timeout=60)


def installed(checkout: Path) -> list[str]:
    return [line for line in (checkout / "log").read_text().splitlines() if " install " in line]


def test_a_python_that_is_too_new_is_passed_over(checkout: Path) -> None:
    done = set_up(checkout, "cpu")
    assert done.returncode == 2 and "no Python from 3.10 to 3.13 found" in done.stderr and "PYTHON=" in done.stderr
    plant(checkout, "python3.11", "3.11")
    done = set_up(checkout, "cpu")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in installed(checkout)} == {"3.11"}


@pytest.mark.parametrize(("version", "device", "constrained"), [("3.12", "gpu", True), ("3.11", "gpu", False), ("3.12", "cpu", False)])
def test_the_lock_holds_for_the_python_and_the_machine_that_it_is_of(checkout: Path, version: str, device: str, constrained: bool) -> None:
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        pytest.skip("the lock is of Linux on x86-64")
    plant(checkout, "python3", version)
    done = set_up(checkout, device)
    assert done.returncode == 0, done.stderr
    lines = installed(checkout)
    assert {f"-c {checkout}/requirements/gpu.lock" in line for line in lines} == {constrained}
    (requirements,) = [line.split() for line in lines if "base.txt" in line]
    assert ({"sglang==0.5.21", "ray[default]==2.60.0"} <= set(requirements)) == (device == "gpu")
    assert set_up(checkout, device).returncode == 0 and installed(checkout) == lines  # a second call has nothing to do


def test_what_is_for_tests_is_installed_beside_the_lock(checkout: Path) -> None:
    """reasoning-gym wants another tabulate than SGLang: one resolution under the lock has no solution."""
    plant(checkout, "python3", "3.12")
    assert set_up(checkout, "gpu", "--dev").returncode == 0
    (tests,) = [line for line in installed(checkout) if "dev.txt" in line]
    assert "rg.txt" in tests and "gpu.lock" not in tests and "()" not in tests
    (checkout / "log").unlink()
    assert set_up(checkout, "cpu", "--dev").returncode == 0
    (everything,) = [line for line in installed(checkout) if "dev.txt" in line]
    assert "base.txt" in everything


def test_transformer_engine_finds_the_headers_that_torch_came_with(checkout: Path) -> None:
    """Its build takes those of the CUDA toolkit, which has neither cuDNN's nor NCCL's."""
    plant(checkout, "python3", "3.12")
    plant(checkout, "nvcc", "")
    assert set_up(checkout, "gpu").returncode == 0
    assert "--no-build-isolation transformer-engine[" in installed(checkout)[-1]
    assert (checkout / "log.headers").read_text() == "/site-packages/nvidia/cudnn/include:/site-packages/nvidia/nccl/include\n"


@pytest.mark.parametrize(("device", "variable", "compiles"), [("cpu", "1", True), ("cpu", "", False), ("gpu", "1", False)])
def test_processes_that_may_not_write_byte_code_find_it(checkout: Path, device: str, variable: str, compiles: bool) -> None:
    """On a CPU pip is told not to make it, because processes make what they import."""
    plant(checkout, "python3", "3.12")
    assert set_up(checkout, device, PYTHONDONTWRITEBYTECODE=variable).returncode == 0
    lines = (checkout / "log").read_text().splitlines()
    assert any(" compileall " in line for line in lines) == compiles
    assert all(" --no-compile " in line for line in installed(checkout)) == (device == "cpu")


def test_a_set_up_that_is_at_work_is_waited_for(checkout: Path) -> None:
    """The lock is on a file that is open for writing: one on a folder is not seen by other nodes of an NFS."""
    plant(checkout, "python3", "3.12")
    code = f"""
import fcntl, time
lock = open({str(checkout / ".venv.lock")!r}, "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print(flush=True)
time.sleep(1.5)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with open(checkout / ".venv.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = set_up(checkout, "cpu")
        assert done.returncode == 0 and "another set-up is at work here; waiting for it" in done.stdout
