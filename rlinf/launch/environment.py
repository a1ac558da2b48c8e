"""environment.jsonl: what a run ran on, a line for each start of the run. Nothing here initializes a GPU."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlinf.config.load import ROOT
from rlinf.config.own_code import checksum_of
from rlinf.data.lines import append_lines
from rlinf.data.tokenizer import TextTokenizer
from rlinf.hardware import cores
from rlinf.record_files import whole_rows
from rlinf.run_paths import ENVIRONMENT_FILE
from rlinf.scheduling.placement import Node
from rlinf.weights.checksum import STRIDE, weights_checksum

WHERE = ("runner.resume_dir", "runner.output_dir", "runner.experiment_name")  # where a run is, not what it does
PACKAGES = ("torch", "megatron-core", "ray", "transformers", "sglang", "transformer-engine", "math-verify", "numpy", "rlinf")


def record_environment(
    run_dir: Path,
    run_id: str,
    first_step: int,
    nodes: Sequence[Node],
    tokenizer: TextTokenizer,
    model_dir: str,
    data_fingerprint: str,
    own_functions: Sequence[tuple[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Append a line for this start.

    first_step: the first step that this start makes. model_dir: the line holds a checksum of some of the bytes of its weights.
    own_functions: (key, `file.py:function`) of the user's own code; the line holds the sha256 of these files.
    settings: the value of every key; config.yaml has only those of the last start.
    """
    found: dict[str, Any] = {
        "run_id": run_id,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": first_step,
        "command": sys.argv,
        "folder": os.getcwd(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpu_models(),
        "devices_by_node": [node.devices for node in nodes],
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := installed(name)) is not None},
        "commit": commit(),
        "chat_markers": tokenizer.chat_markers(),
        "weights": weights_checksum(model_dir, STRIDE),
        "data_fingerprint": data_fingerprint,
        "own_code": {f"{key} {function.rpartition('/')[2]}": checksum_of(function) for key, function in own_functions},
    } | ({} if settings is None else {"settings": dict(settings)})
    append_lines(run_dir / ENVIRONMENT_FILE, [json.dumps(found)])


def changed_settings(run_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """A line `key: OLD, now NEW` for every setting that has changed since the last start in this folder; none in a new folder."""
    starts = whole_rows(run_dir / ENVIRONMENT_FILE) if (run_dir / ENVIRONMENT_FILE).is_file() else []
    before = starts[-1].get("settings", {}) if starts else {}
    now = json.loads(json.dumps(settings))
    found = [key for key in now if key in before and before[key] != now[key] and key not in WHERE]
    return [f"{key}: {json.dumps(before[key])}, now {json.dumps(now[key])}" for key in found]


def cpu_model() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu_models() -> list[str]:
    """As the NVIDIA driver names them."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found += [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("Model")]
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with `+` when files differ from it; None when the package is not run from a checkout."""
    if not (ROOT / ".git").exists():
        return None
    asked = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"], capture_output=True, text=True)
    return asked.stdout.strip() or None
