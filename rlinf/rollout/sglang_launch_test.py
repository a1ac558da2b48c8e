"""The server's start, in an interpreter of its own in which a package of another kind has SGLang's name."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from rlinf.rollout import sglang_launch

SERVER = "import os, sys; print(sys.argv[1:], os.environ.get('LD_LIBRARY_PATH'))"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has SGLang, and a wheel of CUDA's runtime."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "sglang").mkdir()
    (packages / "sglang" / "__init__.py").touch()
    (packages / "sglang" / "launch_server.py").write_text(SERVER)
    (packages / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    (packages / "nvidia" / "cu13" / "lib" / "libcudart.so.99").touch()  # one that no machine has elsewhere
    return folder / "bin" / "python"


@pytest.mark.parametrize("saver", [True, False])
@pytest.mark.parametrize("known", [None, "/opt/own/lib"])
def test_what_the_memory_saver_wants_is_where_the_loader_looks(python: Path, saver: bool, known: str | None, tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(yaml.safe_dump({"device": "cuda", "enable-memory-saver": saver}))
    env = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"} | ({"LD_LIBRARY_PATH": known} if known else {})
    command = [str(python), "-I", sglang_launch.__file__, str(os.getpid()), str(config)]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    runtime = f"{python.parents[1]}/lib/python3.{sys.version_info.minor}/site-packages/nvidia/cu13/lib"
    assert told == f"{['--config', str(config)]} {':'.join(filter(None, (known, runtime if saver else None))) or None}"


def test_a_runtime_that_the_loader_finds_needs_no_help(tmp_path: Path) -> None:
    for wheel, name in (("cu12", "libcudart.so.12"), ("cu13", "libcudart.so.13")):
        (tmp_path / "nvidia" / wheel / "lib").mkdir(parents=True)
        (tmp_path / "nvidia" / wheel / "lib" / name).touch()
    asked: list[str] = []

    def load(name: str) -> None:
        asked.append(name)
        if name.endswith("12"):
            raise OSError(f"{name}: cannot open shared object file")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang_launch.ctypes, "CDLL", load)
        assert sglang_launch.runtimes_of_wheels([str(tmp_path), str(tmp_path / "nothing")]) == [str(tmp_path / "nvidia" / "cu12" / "lib")]
    assert asked == ["libcudart.so.12", "libcudart.so.13"]


def test_the_word_by_which_the_start_knows_the_memory_saver_is_that_of_the_servers_file() -> None:
    assert sglang_launch.MEMORY_SAVER in yaml.safe_dump({"enable-memory-saver": True})
