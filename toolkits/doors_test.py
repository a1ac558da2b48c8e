"""The doors of data and analysis do what the commands do, from any folder, and pass their exit codes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_folders import BEHAVIOURS, HEALTHY, make_run

HERE = Path(__file__).parent
MARKED = "import os, sys; print(os.environ.get('MARK'), *sys.argv[1:])\n"


def run(folder: Path, door: str | Path, *words: object, script: str = "run.sh") -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        ["bash", str(HERE / door / script), *map(str, words)], capture_output=True, text=True, timeout=120, cwd=folder, env=env
    )


def test_data_makes_and_checks_problems(tmp_path: Path) -> None:
    made = run(tmp_path, "data", "generate", "sums", "--train", 12, "--val", 4)
    assert made.returncode == 0 and len((tmp_path / "sums" / "train.jsonl").read_text().splitlines()) == 12, made.stderr
    checked = run(tmp_path, "data", "check", "sums/val.jsonl")
    assert checked.returncode == 0 and "4" in checked.stdout, checked.stderr
    refused = run(tmp_path, "data", "check", "none.jsonl")
    assert refused.returncode == 2 and "none.jsonl" in refused.stderr


def test_analysis_reports_and_compares(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, behaviour, steps=10) for name, behaviour in (("a", HEALTHY), ("b", BEHAVIOURS["entropy-collapse"]))]
    reported = run(tmp_path, "analysis", "report", runs[0], "--output", "page.html")
    assert reported.returncode == 0 and "</html>" in (tmp_path / "page.html").read_text(), reported.stderr
    compared = run(tmp_path, "analysis", "compare", *runs)
    assert compared.returncode == 0 and "part at step 1" in compared.stdout, compared.stdout + compared.stderr
    refused = run(tmp_path, "analysis", "delete", runs[0])
    assert refused.returncode == 2 and "report RUN_DIR" in refused.stderr


@pytest.mark.parametrize("script", ["mg2hf.sh", "mg2hf_1.5b.sh", "mg2hf_7b.sh"])
def test_the_converters_start_from_any_folder_with_the_environment_of_their_checkout(tmp_path: Path, script: str) -> None:
    checkout = tmp_path / "checkout"
    for name, text in {"rlinf/__init__.py": "", "rlinf/__main__.py": MARKED, ".venv/bin/activate": "export MARK=activated\n"}.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    shutil.copytree(HERE / "ckpt_convertor", checkout / "toolkits" / "ckpt_convertor")
    started = run(tmp_path, checkout / "toolkits" / "ckpt_convertor", "step_000001", "out", script=script)
    assert started.stdout == "activated export step_000001 out\n", started.stderr
    for words, code in (([], 2), (["step_000001"], 2), (["--dtype", "fp16"], 2), (["--help"], 0)):
        told = run(tmp_path, "ckpt_convertor", *words, script=script)
        assert told.returncode == code and told.stdout == ""
        assert told.stderr.startswith("A checkpoint as a Hugging Face model folder: mg2hf.sh CKPT_PATH_MG CKPT_PATH_HF [")
