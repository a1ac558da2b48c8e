"""toolkits/setup/wheels.sh with a stand-in for pip: what it gathers, and when it gives up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
case "$*" in
  "- "*) sed 's/sys.version_info\\[:2\\]/{version}/' | exec {real} "$@";;
  *" freeze "*) printf '%s\\n' {frozen};;
  *)
    echo "$*" >>{log}
    for word in "$@"; do if [[ "$word" == *installed.txt || "$word" == *locked.txt ]]; then sed 's/^/  /' "$word" >>{log}; fi; done
    [[ "$*" != *{missing}* || "$*" == *index* ]];;
esac
"""
LOCK = "# written by a tool\n\nsglang==0.5.21    # wheel\ncuda-tile==1.6.0  # source\ntabulate==0.10.0  # wheel\nelsewhere==1.0  # wheel\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("toolkits/setup", "requirements", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "toolkits/setup/wheels.sh", tmp_path / "toolkits/setup")
    (tmp_path / "toolkits/setup/venv.sh").write_text(f'echo "venv.sh $*" >>{tmp_path}/log\n')
    (tmp_path / "requirements/gpu.lock").write_text(LOCK)
    return tmp_path


def gather(
    checkout: Path, *frozen: str, version: str = "(3, 12)", missing: str = "nothing", words: tuple[str, ...] = ("wheels",)
) -> subprocess.CompletedProcess:
    python = checkout / ".venv/bin/python"
    code = PYTHON.format(version=version, real=sys.executable, frozen=" ".join(frozen), log=checkout / "log", missing=missing)
    python.write_text(code)
    python.chmod(0o755)
    command = ["bash", str(checkout / "toolkits/setup/wheels.sh"), *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)


def asked(checkout: Path) -> str:
    text = (checkout / "log").read_text()
    for words, short in ((f"{checkout}/", ""), ("-m pip ", ""), ("--disable-pip-version-check -q ", ""), ("-w wheels ", "")):
        text = text.replace(words, short)
    return text


FROM_SOURCE = "--no-deps --no-build-isolation"


def test_everything_that_is_installed_is_gathered_with_the_tools_to_build_it(checkout: Path) -> None:
    """And what tests have displaced, which a set-up installs before them."""
    done = gather(checkout, "sglang==0.5.21", "cuda_tile==1.6.0", "tabulate==0.9.0")
    assert done.returncode == 0 and done.stdout == f"wheels: 0 in {checkout}/wheels\n", done.stderr
    assert asked(checkout) == (
        "venv.sh --dev\ninstall -r requirements/build.txt\nwheel -r requirements/build.txt\n"
        f"wheel {FROM_SOURCE} -r wheels/installed.txt\n  sglang==0.5.21\n  cuda_tile==1.6.0\n  tabulate==0.9.0\n"
        f"wheel {FROM_SOURCE} -r wheels/locked.txt\n  tabulate==0.10.0\n"
    )


@pytest.mark.parametrize(("frozen", "version"), [(("sglang==0.5.21", "tabulate==0.9.0"), "(3, 11)"), (("tabulate==0.9.0",), "(3, 12)")])
def test_where_the_lock_does_not_hold_only_what_is_installed_is_gathered(checkout: Path, frozen: tuple[str, ...], version: str) -> None:
    assert gather(checkout, *frozen, version=version).returncode == 0
    assert "locked.txt" not in asked(checkout)


@pytest.mark.parametrize("missing", ["nothing", "torch=="])
def test_torch_for_cpu_comes_from_its_own_index_if_need_be(checkout: Path, missing: str) -> None:
    assert gather(checkout, "torch==2.13.0+cpu", "torchlike==1.0", missing=missing).returncode == 0
    wheels = [line for line in asked(checkout).splitlines() if "+cpu" in line]
    index = "wheel --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
    assert wheels == ["wheel --no-deps torch==2.13.0+cpu"] + [index] * (missing == "torch==")
    assert (checkout / "wheels/installed.txt").read_text() == "torchlike==1.0\n"


def test_what_cannot_be_gathered_is_named(checkout: Path) -> None:
    for words in ((), ("--dev",), ("a", "b")):
        done = gather(checkout, words=words)
        assert done.returncode == 2 and done.stderr == "wheels: error: usage: wheels.sh DIR\n" and not (checkout / "log").exists()
    done = gather(checkout, "sglang==0.5.21", missing="installed.txt")
    assert done.returncode == 2 and "pip could not gather what is installed (its words are above)" in done.stderr
    (checkout / "toolkits/setup/venv.sh").write_text("exit 2")
    (checkout / "log").unlink()
    assert gather(checkout).returncode == 2 and not (checkout / "log").exists()
