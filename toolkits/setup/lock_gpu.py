"""Resolves requirements/base.txt + gpu.txt for CUDA machines and writes requirements/gpu.lock: lock_gpu.py [UV]

Needs uv (`pip install uv`); downloads metadata only, so any machine can do it. A line says whether its package comes as a wheel or is
built on the machine (`source`). A resolution is no proof that the set runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "gpu.lock"
PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_39"  # Ubuntu 24.04's, which docker/Dockerfile starts from
# Its source archive names the core library of CUDA 12; when it is built next to a torch of CUDA 13 it asks for the other one.
REPLACED = "transformer-engine-cu12"
HEADER = f"""\
# Every package of a CUDA machine: Linux x86-64, Python {PYTHON}, CUDA 13. Written by toolkits/setup/lock_gpu.py from base.txt and gpu.txt.
# Use it as constraints: pip install -c requirements/gpu.lock ".[gpu]" (docker/Dockerfile shows all steps).
# `wheel`: installed as published; `source`: built or fetched by its own build step on the machine. A resolution is no proof that it runs.
"""


def resolve(uv: str) -> list[dict]:
    """The packages of uv's pylock, in the order of their names."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "pylock.toml"
        command = [
            uv, "pip", "compile", str(ROOT / "requirements/base.txt"), str(ROOT / "requirements/gpu.txt"),
            "--python-version", PYTHON, "--python-platform", PLATFORM,
            "--no-build-isolation-package", "transformer-engine-torch", "--no-emit-package", REPLACED, "--quiet", "-o", str(target),
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return tomllib.loads(target.read_text())["packages"]


def render(packages: list[dict]) -> str:
    pins = [(f"{re.sub(r'[-_.]+', '-', p['name']).lower()}=={p['version']}", "wheel" if p.get("wheels") else "source") for p in packages]
    width = max(len(pin) for pin, _ in pins)
    return HEADER + "\n" + "".join(f"{pin:<{width}}  # {kind}\n" for pin, kind in sorted(pins))


if __name__ == "__main__":
    LOCK.write_text(render(resolve(sys.argv[1] if len(sys.argv) > 1 else "uv")))
