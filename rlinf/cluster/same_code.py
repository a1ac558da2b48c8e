"""Checks that all processes of a run, on whatever node, run the same code: with two versions a run would fail late and in strange ways."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "sglang", "transformers")
OURS = "rlinf's files"
ROOT = Path(__file__).resolve().parents[1]


@cache
def own_code(root: Path = ROOT) -> dict[str, str]:
    """The code of this process: a digest of rlinf's sources, and the versions of the packages that it uses."""
    return {OURS: source_digest(root)[:12]} | {name: _version(name) for name in PACKAGES}


def source_digest(root: Path) -> str:
    """A digest of names and bytes of the modules below `root`, without tests; it is the same for a wheel and for a checkout."""
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        if not file.name.endswith("_test.py") and file.name != "conftest.py":
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def differences(driver: Mapping[str, str], here: Mapping[str, str], where: str) -> str | None:
    """A message about a process that runs other code than the driver; None when they run the same."""
    other = [name for name in (OURS, *PACKAGES) if driver.get(name) != here.get(name)]
    if not other:
        return None
    named = "; ".join(f"{name}: the driver has {driver.get(name)}, this node has {here.get(name)}" for name in other)
    return (
        f"{where} runs other code than the driver ({named}). Install the same on every node (one image, one shared folder, or the same "
        "commit and requirements/gpu.lock), and restart Ray there if it was started from another environment"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
