from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from rlinf.checks import toolchain
from rlinf.checks.finding import FAIL, OK, WARN, Finding


def made(file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o755)
    return str(file)


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [((3, 9), False, FAIL), ((3, 10), True, OK), ((3, 13), True, OK), ((3, 14), True, WARN), ((3, 14), False, OK)],
)
def test_a_python_without_wheels_is_found(version: tuple[int, int], cuda: bool, status: str) -> None:
    assert toolchain.python(version, cuda).status == status


def test_a_glibc_that_is_too_old_is_found() -> None:
    assert [toolchain.glibc(f"glibc {version}").status for version in ("2.31", "2.34", "2.39")] == [WARN, OK, OK]
    assert "2.31" in toolchain.glibc("glibc 2.31").text


def test_compilers_are_looked_for_where_sglang_looks(tmp_path: Path) -> None:
    nvcc, path = made(tmp_path / "cuda" / "bin" / "nvcc"), str(tmp_path / "path")
    made(tmp_path / "path" / "c++")
    good = list(toolchain.compilers({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": path}, needed=True))
    assert good == [Finding("nvcc", OK, nvcc), Finding("c++", OK, f"{path}/c++")]
    on_path = list(toolchain.compilers({"PATH": str(tmp_path / "cuda" / "bin"), "CXX": f"{path}/c++"}, needed=True))
    assert [f.status for f in on_path] == [OK, OK]


def test_compilers_that_are_missing_are_fatal_for_a_run_with_sglang(tmp_path: Path) -> None:
    """CUDA_HOME wins over the PATH, as it does in SGLang."""
    made(tmp_path / "bin" / "nvcc")
    environment = {"CUDA_HOME": "/nowhere", "PATH": str(tmp_path / "bin"), "CXX": "clang++-99"}
    assert [f.status for f in toolchain.compilers(environment, needed=False)] == [WARN, WARN]
    nvcc, compiler = toolchain.compilers(environment, needed=True)
    assert nvcc.status == compiler.status == FAIL
    assert "CUDA_HOME is /nowhere" in nvcc.text and "CUDA toolkit" in nvcc.remedy
    assert "there is no clang++-99" in compiler.text and "g++" in compiler.remedy


def test_what_triton_needs_is_fatal_for_a_run_with_sglang_when_it_is_missing() -> None:
    assert toolchain.triton(None, needed=True).status == OK
    missing = [toolchain.triton("/usr/include/python3.12/Python.h", needed) for needed in (False, True)]
    assert [f.status for f in missing] == [WARN, FAIL]
    assert "/usr/include/python3.12/Python.h" in missing[0].text and "python3-dev" in missing[0].remedy


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version:  gcc version 12.2.0\n", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n", "580.65.06"),
        ("NVRM version: something else\n", None),
    ],
)
def test_the_driver_is_read_of_both_kinds_of_kernel_module(text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert toolchain.driver_version(tmp_path / "version") == version
    assert toolchain.driver_version(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, OK),
        ({"http_proxy": "http://proxy:3128"}, WARN),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost, .example.org"}, WARN),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1,10.0.0.1"}, OK),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, OK),
        ({"http_proxy": ""}, OK),
    ],
)
def test_a_proxy_for_the_machine_itself_is_found(environment: dict[str, str], status: str) -> None:
    found = toolchain.proxies(environment)
    assert found.status == status and ("no_proxy" in found.remedy) == (status == WARN)


def test_a_folder_without_locks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.locks(tmp_path).status == OK

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = toolchain.locks(tmp_path)
    assert found.status == FAIL and "Function not implemented" in found.text and "-o flock" in found.remedy
    assert list(tmp_path.iterdir()) == []
