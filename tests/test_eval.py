"""`rlinf eval` as a whole: a tiny random model with the real engine, and answers from a script where the scores must be known."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlinf.cli import main
from rlinf.launch.train import WORKERS
from rlinf.metrics.names import undocumented
from tests.eval_workers import SCRIPT
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ["cluster.backend=local", "cluster.device=cpu", "rollout.rollout_backend=embedded", "rollout.precision=fp32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2-tied")


@pytest.fixture(autouse=True)
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def write_problems(path: Path, count: int = 6, task: str = "math") -> Path:
    solution = "\\boxed{C}" if task == "choice" else "\\boxed{%d}"
    rows = [
        {
            "prompt": f"What is {i}+{i}?",
            "task": task,
            "query_id": f"p{i}",
            "solutions": [solution if task == "choice" else solution % (2 * i)],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(folder: Path, *models: Path, n: int = 4, max_tokens: int = 8, **custom: object) -> list[str]:
    settings = {"path": folder / "set.jsonl", "n": n, "temperature": 1.0, "max_tokens": max_tokens} | custom
    return [
        *map(str, models),
        *LOCAL,
        f"evaluation.output_dir={folder / 'out'}",
        *(f"evaluation.custom.{k}={v}" for k, v in settings.items()),
    ]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]  # at \n alone: texts hold other separators


def samples(folder: Path, model: str = "tiny", name: str = "set") -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder / "out" / model / name / "samples.jsonl")]


def results(folder: Path, model: str = "tiny", name: str = "set") -> dict:
    return json.loads((folder / "out" / model / name / "results.json").read_text())


def answer_with(monkeypatch: pytest.MonkeyPatch, folder: Path, answers: dict[str, list[str]]) -> None:
    (folder / "answers.json").write_text(json.dumps(answers))
    monkeypatch.setenv(SCRIPT, str(folder / "answers.json"))
    monkeypatch.setitem(WORKERS, "rollout", "tests.eval_workers:ScriptedRollout")


@pytest.mark.parametrize(
    ("answer", "score"),
    [("so \\boxed{%d}", 1), ("\\boxed{0%d}", 1), ("\\boxed{%d.0}", 1), ("", 0), ("%d", 0), ("\\boxed{%d} or \\boxed{-1}", 0)],
)
def test_the_gold_in_a_box_scores_all_and_nothing_scores_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, answer: str, score: int
) -> None:
    write_problems(tmp_path / "set.jsonl")
    answer_with(monkeypatch, tmp_path, {f"p{i}": [answer % (2 * i) if "%d" in answer else answer] * 2 for i in range(6)})
    assert main(["eval", *words(tmp_path, model, n=2)]) == 0
    scores = {name: s["value"] for name, s in results(tmp_path)["scores"].items()}
    assert [scores[name] for name in ("avg@2", "pass@2", "maj@2", "g-pass@1_1")] == [score] * 4
    assert scores["no_box"] == ("boxed" not in answer)


def test_a_random_letter_scores_a_quarter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 40, "choice")
    rng = random.Random(0)
    answer_with(monkeypatch, tmp_path, {f"p{i}": [f"\\boxed{{{rng.choice('ABCD')}}}" for _ in range(16)] for i in range(40)})
    assert main(["eval", *words(tmp_path, model, n=16)]) == 0
    assert results(tmp_path)["scores"]["avg@16"]["value"] == pytest.approx(0.25, abs=2.5 * math.sqrt(0.25 * 0.75 / 640))


def independent_scores(dump: list[dict], n: int) -> dict[str, float]:
    """The scores from the dump alone, in as few words as possible: nothing of ours is used."""
    problems: dict[str, list[dict]] = {}
    for row in dump:
        problems.setdefault(row["problem"], []).append(row)
    scores: Counter[str] = Counter()
    for rows in problems.values():
        assert sorted(r["sample"] for r in rows) == list(range(n))
        c = sum(r["status"] == "right" for r in rows)
        scores[f"avg@{n}"] += c / n
        for k in (2, 4):
            miss = Fraction(1)
            for i in range(k):
                miss *= Fraction(max(n - c - i, 0), n - i)
            scores[f"pass@{k}"] += float(1 - miss)
        votes = Counter("right" if r["status"] == "right" else r["extracted"] for r in rows if r["extracted"] is not None)
        best = [v for v in votes if votes[v] == max(votes.values())]
        scores[f"maj@{n}"] += ("right" in best) / max(1, len(best))
        scores["truncated"] += sum(r["finish"] == "length" for r in rows) / n
        scores["no_box"] += sum(r["extracted"] is None for r in rows) / n
        scores["undecided"] += sum(r["status"] == "undecided" for r in rows) / n
        scores["response_length"] += sum(r["length"] for r in rows) / n
    return {name: total / len(problems) for name, total in scores.items()}


def test_scores_equal_an_independent_count_over_the_dump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 10)
    rng = random.Random(3)
    kinds = ["\\boxed{%d}", "\\boxed{%d}", "\\boxed{99}", "\\boxed{98}", "no answer", "cut here", "\\boxed{2^{2^{2^{2^{2^{99}}}}}}"]
    answers = {f"p{i}": [k % (2 * i) if "%d" in k else k for k in rng.choices(kinds, k=12)] for i in range(10)}
    answer_with(monkeypatch, tmp_path, answers)
    assert main(["eval", *words(tmp_path, model, n=12)]) == 0
    found = {name: s["value"] for name, s in results(tmp_path)["scores"].items()}
    expected = independent_scores(samples(tmp_path), 12)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert 0.1 < found["avg@12"] < 0.5 and found["truncated"] > 0 and found["no_box"] > found["truncated"]
    by_problem = {p["problem"]: p for p in results(tmp_path)["per_problem"]}
    assert all(by_problem[p]["right"] == sum(a.strip() == f"\\boxed{{{2 * int(p[1:])}}}" for a in answers[p]) for p in answers)


def test_a_tiny_model_from_start_to_end(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_problems(tmp_path / "set.jsonl")
    command = ["eval", *words(tmp_path, model, n=10, template="chat"), f"evaluation.opencompass_dir={tmp_path / 'oc'}"]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "samples 60/60" in err and "set: 6 problems, 10 sample(s) each" in err
    first = samples(tmp_path)
    assert [(r["problem"], r["sample"]) for r in first] == [(f"p{i}", k) for i in range(6) for k in range(10)]
    assert all(
        r["prompt"].startswith("<user>What is") and "\\boxed{}" in r["prompt"] and r["prompt"].endswith("<assistant>") for r in first
    )
    assert len({r["response"] for r in first}) > 50 and all(r["length"] <= 8 for r in first)
    assert not (tmp_path / "out" / "tiny" / "set" / "parts").exists()
    predictions = json.loads((tmp_path / "oc" / "predictions" / "tiny" / "set.json").read_text())
    assert list(predictions) == [str(i) for i in range(60)]
    assert predictions["13"] == {
        "origin_prompt": first[12]["prompt"],
        "prediction": first[12]["response"],
        "gold": "2",
    }  # pass 2, problem 1

    assert main(command) == 0
    assert "all 60 samples are there already" in capsys.readouterr().err and samples(tmp_path) == first

    (tmp_path / "out").rename(tmp_path / "before")
    assert main([*command, "rollout.max_running_requests=3"]) == 0  # another order of work, the same samples
    assert samples(tmp_path) == first


def test_the_seed_changes_the_samples(tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl")
    assert main(["eval", *words(tmp_path, model)]) == 0
    first = [r["response"] for r in samples(tmp_path)]
    (tmp_path / "out").rename(tmp_path / "before")
    assert main(["eval", *words(tmp_path, model), "rollout.seed=9"]) == 0
    assert [r["response"] for r in samples(tmp_path)] != first


def test_checkpoints_of_a_run_are_compared_and_become_a_curve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_problems(tmp_path / "set.jsonl")
    run = tmp_path / "run-a" / "checkpoints"
    steps = [make_tiny_model(run / f"step_{step:06d}" / "hf", "qwen2-tied", seed=step).parent for step in (10, 20)]
    answer_with(monkeypatch, tmp_path, {f"p{i}": [f"\\boxed{{{2 * i}}}", "\\boxed{-1}"] for i in range(6)})
    assert main(["eval", *words(tmp_path, steps[0], n=2)]) == 0
    answer_with(monkeypatch, tmp_path, {f"p{i}": [f"\\boxed{{{2 * i}}}"] * 2 for i in range(6)})
    assert main(["eval", *words(tmp_path, steps[0], steps[1] / "hf", n=2)]) == 0  # the folder of the checkpoint, or its hf folder
    assert "run-a-step_000010: all 12 samples are there already" in capsys.readouterr().err
    (versus,) = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert versus["from"] == "run-a-step_000010" and versus["to"] == "run-a-step_000020"
    assert versus["gain"]["value"] == 0.5 and versus["problems_better"] == 6 and versus["p_value"] == 2 / 2**6
    curve = EventAccumulator(str(tmp_path / "out" / "curves" / "run-a" / "tensorboard"))
    curve.Reload()
    assert [(e.step, e.value) for e in curve.Scalars("benchmark/set/avg@2")] == [(10, 0.5), (20, 1.0)]
    assert undocumented(curve.Tags()["scalars"]) == []


def test_several_sets_have_their_own_protocol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl")
    write_problems(tmp_path / "gpqa.jsonl", 3, "choice")
    answer_with(monkeypatch, tmp_path, {f"p{i}": ["\\boxed{C}"] * 10 for i in range(6)})
    gpqa = [f"evaluation.gpqa_diamond.{k}={v}" for k, v in {"path": tmp_path / "gpqa.jsonl", "n": 10, "max_tokens": 64}.items()]
    assert main(["eval", *words(tmp_path, model, n=2), *gpqa]) == 0
    assert results(tmp_path)["scores"]["avg@2"]["value"] == 0 and results(tmp_path, name="gpqa_diamond")["scores"]["avg@10"]["value"] == 1
    assert "choice letter" in samples(tmp_path, name="gpqa_diamond")[0]["prompt"]
    assert results(tmp_path, name="gpqa_diamond")["identity"]["protocol"]["temperature"] == 0.6


def test_a_judge_of_the_users_own_that_fails_is_told_at_once_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text("def judge(answer, solutions):\n    return answer == '0' or oops\n")
    write_problems(tmp_path / "set.jsonl", 3, "odd")
    answer_with(monkeypatch, tmp_path, {"p0": ["\\boxed{0}"] * 2, "p1": ["\\boxed{0}", "\\boxed{1}"], "p2": ["\\boxed{0}"] * 2})
    assert main(["eval", *words(tmp_path, model, n=2), f"reward.own_tasks={{odd: {tmp_path}/mine.py:judge}}"]) == 0
    why = "responses, so they are UNDECIDED: NameError: name 'oops' is not defined (mine.py:2)"
    assert [m for m in caplog.messages if "own_tasks" in m] == [
        f"tiny, set/p1/0: reward.own_tasks odd failed for 1 of 2 {why}",
        f"tiny: reward.own_tasks odd failed for 1 of 6 {why}",
    ]


def test_a_killed_evaluation_goes_on_and_repeats_nothing(tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 24)
    command = ["eval", *words(tmp_path, model, n=12, max_tokens=64)]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        [sys.executable, "-m", "rlinf", *command, "rollout.max_running_requests=4"], stderr=subprocess.DEVNULL, env=env
    )
    part = tmp_path / "out" / "tiny" / "set" / "parts" / "0.jsonl"
    deadline = time.monotonic() + 120
    while not part.exists() or part.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    lines = rows_of(part)
    whole = {g for g, count in Counter(row["group_id"] for row in lines).items() if count == (8 if g.endswith("/0") else 4)}
    assert 0 < len(whole) < 48
    with open(part, "a") as file:
        file.write('{"group_id": "set/p23/0", "sam')  # a write that the kill cut short

    assert main(command) == 0
    final = rows_of(tmp_path / "out" / "tiny" / "set" / "samples.jsonl")
    kept = {(row["group_id"], row["sample_id"]): row["seconds"] for row in final}
    assert len(final) == len(kept) == 24 * 12
    assert all(
        kept[row["group_id"], row["sample_id"]] == row["seconds"] for row in lines if row["group_id"] in whole
    )  # the very same verdicts
    resumed = samples(tmp_path)
    (tmp_path / "out").rename(tmp_path / "before")
    assert main(command) == 0
    assert samples(tmp_path) == resumed  # as if it had never been interrupted


@pytest.mark.slow
def test_two_engines_under_ray_give_the_samples_of_one_process(tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 12)
    assert main(["eval", *words(tmp_path, model, n=12, max_tokens=32)]) == 0
    alone = samples(tmp_path)
    (tmp_path / "out").rename(tmp_path / "before")
    ray = ["cluster.backend=ray", "cluster.num_gpus_per_node=2", "cluster.threads_per_worker=1"]
    done = subprocess.run(
        [sys.executable, "-m", "rlinf", "eval", *words(tmp_path, model, n=12, max_tokens=32), *ray],
        capture_output=True, text=True, timeout=300, env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert samples(tmp_path) == alone
    assert {p.name for p in (tmp_path / "out" / "tiny" / "workers").glob("rollout-*.log")} == {"rollout-0.log", "rollout-1.log"}


@pytest.mark.slow
def test_engines_that_are_killed_or_stand_still_change_no_sample(tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 24)
    settings = words(tmp_path, model, n=12, max_tokens=64)
    assert main(["eval", *settings]) == 0
    alone = samples(tmp_path)
    (tmp_path / "out").rename(tmp_path / "before")
    ray = ["cluster.backend=ray", "cluster.num_gpus_per_node=2", "cluster.threads_per_worker=1", "rollout.max_running_requests=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlinf", "eval", *settings, *ray, "rollout.max_engine_restarts=2", "rollout.stall_timeout=20"],
        stderr=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    parts, logs = tmp_path / "out" / "tiny" / "set" / "parts", tmp_path / "out" / "tiny" / "workers"
    for rank, signal_number in ((0, signal.SIGKILL), (1, signal.SIGSTOP)):
        deadline = time.monotonic() + 120
        while sum(part.read_bytes().count(b"\n") for part in parts.glob("*.jsonl")) < 24 * (rank + 1):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int(re.findall(r"pid (\d+)", (logs / f"rollout-{rank}.log").read_text())[-1]), signal_number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert errors.count("It is started anew") == 2 and samples(tmp_path) == alone
    assert {p.name for p in (tmp_path / "out" / "tiny" / "set").iterdir()} == {"identity.json", "samples.jsonl", "results.json"}
