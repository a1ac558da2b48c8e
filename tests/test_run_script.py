"""tests/run.sh and .ci/run with stand-ins for set-up and pytest: which tests they ask for, in which order, and with what code they end."""

from __future__ import annotations

import shutil
import subprocess
import time
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTED = '#!/bin/bash\necho "{name} $*{more}" >>{log}\n{rest}\n'
NEXT_CODE = 'code="$(head -1 {codes})"; sed -i 1d {codes}; exit "${{code:-0}}"'
FAST, SLOW, GPU = "not slow and not gpu", "slow and not gpu", "gpu"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("tests/run.sh", ".ci/run"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("toolkits/setup/venv.sh", "toolkits/setup/sglang_cpu.sh", ".venv/bin/rlinf"):
        plant(tmp_path, name)
    plant(tmp_path, ".venv/bin/python", rest=NEXT_CODE.format(codes=tmp_path / "codes"), more=" [${CUDA_VISIBLE_DEVICES-all}]")
    (tmp_path / "codes").touch()
    return tmp_path


def plant(checkout: Path, name: str, rest: str = "", more: str = "") -> None:
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text(NOTED.format(name=Path(name).name, log=checkout / "log", rest=rest, more=more))
    (checkout / name).chmod(0o755)


def run(checkout: Path, name: str, *words: str, codes: tuple[int, ...] = ()) -> tuple[int, list[str]]:
    """Its exit code, and what it called. codes: of the calls of python, in their order."""
    (checkout / "codes").write_text("".join(f"{code}\n" for code in codes))
    (checkout / "log").write_text("")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(checkout), "RLINF_CACHE": str(checkout / "cache")}
    done = subprocess.run(["bash", str(checkout / name), *words], env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, (checkout / "log").read_text().splitlines()


def tiers(calls: list[str]) -> list[str]:
    return [call.split("-m pytest -m ")[1].split(" -n ")[0] for call in calls if "-m pytest" in call]


def test_the_fast_tier_is_one_call_side_by_side_without_a_gpu(checkout: Path) -> None:
    code, calls = run(checkout, "tests/run.sh", "-k", "some name")
    assert code == 0 and calls[0] == "venv.sh --dev" and len(calls) == 2
    assert tiers(calls) == [FAST] and calls[1].endswith("-k some name []") and "-n logical --maxprocesses 4 --dist loadfile" in calls[1]


def test_everything_is_three_tiers_one_after_the_other_with_all_that_they_need(checkout: Path) -> None:
    code, calls = run(checkout, "tests/run.sh", "--full", "-x")
    assert code == 0 and tiers(calls) == [FAST, SLOW, GPU]
    needed = ["venv.sh --dev", "python toolkits/setup/fetch_smollm2.py [all]", f"rlinf data generate {checkout}/cache/data/arithmetic"]
    assert calls[:3] == needed and ("sglang_cpu.sh " in calls) == (not Path("/dev/nvidiactl").exists())
    assert [call.split()[-2:] for call in calls[-3:]] == [["-x", "[]"], ["-x", "[]"], ["-x", "[all]"]]  # the last may see a GPU
    assert all(" -n 0 " in call for call in calls[-2:])


NO_TESTS = 5  # pytest's code where the arguments select none


@pytest.mark.parametrize(
    ("words", "codes", "code"),
    [
        ((), (1,), 1),
        ((), (NO_TESTS,), NO_TESTS),
        (("--full",), (0, 1, 0, 0), 1),
        (("--full",), (0, 0, 1, 0), 1),
        (("--full",), (0, 0, 0, 2), 2),
        (("--full",), (0, NO_TESTS, 0, NO_TESTS), 0),
        (("--full",), (0, 1, NO_TESTS, NO_TESTS), 1),
    ],
    ids=["fast", "none", "fast of all", "slow", "gpu", "slow alone", "fast alone"],
)
def test_what_fails_in_any_tier_is_the_exit_code_and_the_others_run(
    checkout: Path, words: tuple[str, ...], codes: tuple[int, ...], code: int
) -> None:
    found, calls = run(checkout, "tests/run.sh", *words, codes=codes)
    assert found == code and len(tiers(calls)) == (3 if words else 1)


def test_a_set_up_that_fails_ends_it(checkout: Path) -> None:
    plant(checkout, "toolkits/setup/venv.sh", rest="exit 2")
    assert run(checkout, "tests/run.sh") == (2, ["venv.sh --dev"])


@pytest.mark.parametrize(("codes", "code"), [((0,), 0), ((1, 0), 0), ((1, 1), 1)], ids=["good", "mended", "broken"])
def test_what_failed_is_tried_once_more_and_no_third_time(checkout: Path, codes: tuple[int, ...], code: int) -> None:
    plant(checkout, "tests/run.sh", rest=NEXT_CODE.format(codes=checkout / "codes"))
    now = time.time()
    found, calls = run(checkout, ".ci/run", codes=codes)
    assert found == code and len(calls) == len(codes)
    first = calls[0].split()
    assert first[:4] == ["run.sh", "--full", "--order", f"{date.today()}"] and abs(int(first[5]) - now - 1200) < 60
    assert all("--full --last-failed --last-failed-no-failures none" in call for call in calls[1:])
