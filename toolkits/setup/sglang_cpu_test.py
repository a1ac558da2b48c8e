"""toolkits/setup/sglang_cpu.sh with stand-ins for Python and pip: the Python that it takes, what it installs, when it has nothing to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-c "*"(3, 11)"*) [[ {version} == 3.11 ]];;
  "-c "*purelib*) mkdir -p "$(dirname "$0")/../site" && echo "$(dirname "$0")/../site";;
  "-c "*sglang*) {imports};;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; mkdir -p "$3/site";;
  "-m pip") echo "$*" >>{log}; [[ -d "$(dirname "$0")/../site" && ! ( "$*" == *torch==* && "$*" != *index* && -n "{other_index}" ) ]];;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("requirements", "toolkits/setup/sglang_cpu", "toolkits/setup/sglang_cpu.sh"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python", "python3.11"):
        plant(tmp_path, name, "3.12")
    return tmp_path


def plant(checkout: Path, name: str, version: str, imports: str = "true", other_index: str = "") -> None:
    file = checkout / "bin" / name
    file.write_text(PYTHON.format(version=version, log=checkout / "log", imports=imports, other_index=other_index))
    file.chmod(0o755)


def set_up(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "RLINF_CACHE": str(checkout / "cache"), "HOME": os.environ["HOME"]} | variables
    command = ["bash", str(checkout / "toolkits/setup/sglang_cpu.sh"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def installed(checkout: Path) -> list[str]:
    return [line.split("--no-deps ")[1] for line in (checkout / "log").read_text().splitlines() if " install " in line]


def test_it_installs_the_pins_once_with_the_python_that_they_are_of(checkout: Path) -> None:
    plant(checkout, "python3.11", "3.11")
    done = set_up(checkout)
    assert done.returncode == 0 and "installing SGLang for CPU" in done.stdout, done.stderr
    torch = re.search(r"^torch==[0-9.]+", (ROOT / "requirements/sglang-cpu.txt").read_text(), re.M)
    assert torch and installed(checkout) == [f"{torch[0]}+cpu", f"-r {checkout}/cache/sglang-cpu/rlinf-pins.txt"]
    pins = (checkout / "cache/sglang-cpu/rlinf-pins.txt").read_text()
    assert "sglang" in pins and "torch==" not in re.sub(r"\w+torch==", "", pins)
    assert (checkout / "cache/sglang-cpu/site/rlinf_sglang_cpu.pth").exists()
    again = set_up(checkout)
    assert (again.returncode, again.stdout) == (0, "") and len(installed(checkout)) == 2
    with (checkout / "requirements/sglang-cpu.txt").open("a") as pins_file:
        pins_file.write("other==1.0\n")
    assert set_up(checkout).returncode == 0 and len(installed(checkout)) == 4  # other pins


def test_torch_comes_from_its_own_index_where_pip_finds_no_build_for_cpu(checkout: Path) -> None:
    plant(checkout, "python3.11", "3.11", other_index="yes")
    done = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert [("--extra-index-url" in line, "torch==" in line) for line in installed(checkout)] == [
        (False, True),
        (True, True),
        (False, False),
    ]


def test_what_cannot_be_is_refused_with_the_reason(checkout: Path) -> None:
    for words, variables, told in (
        (["--dev"], {}, "unknown argument --dev; usage: sglang_cpu.sh"),
        ([], {}, "pinned for Python 3.11, and there is none; install it, or name it: PYTHON=/path/to/python3.11"),
        ([], {"PYTHON": "/none/python"}, "there is none (PYTHON=/none/python)"),
    ):
        done = set_up(checkout, *words, **variables)
        assert done.returncode == 2 and told in done.stderr and not (checkout / "log").exists()
    plant(checkout, "python3.11", "3.11", imports="{ echo no kernels >&2; false; }")
    done = set_up(checkout)
    log = checkout / "cache/sglang-cpu/rlinf-import.log"
    assert (
        done.returncode == 2 and f"sglang does not import in {log.parent}; see {log}" in done.stderr and log.read_text() == "no kernels\n"
    )
    assert not (checkout / "cache/sglang-cpu/rlinf-stamp").exists()
