"""The rules name the cause of a run that went bad, and are silent on a healthy one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlinf.report.rules import Finding, broken_verifier, entropy_collapse, find_problems, not_finite, skipped_updates, with_effects
from rlinf.report.run_data import RunData, count_all, open_run
from rlinf.report.task_counts import StepCounts, TaskCounts, count_samples, number, plain
from tests.run_folders import BEHAVIOURS, HEALTHY, Behaviour, make_run, solve


def problems(path: Path) -> list[Finding]:
    run = open_run(path)
    for _ in count_all(run):
        pass
    return find_problems(run)


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_has_no_finding(tmp_path: Path, seed: int) -> None:
    assert problems(make_run(tmp_path, HEALTHY, seed=seed)) == []


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_cause_of_a_bad_run_comes_first(tmp_path: Path, name: str) -> None:
    first = problems(make_run(tmp_path, BEHAVIOURS[name]))[0]
    assert first.rule == name and first.evidence and first.advice and first.cause


def test_the_evidence_is_in_numbers(tmp_path: Path) -> None:
    collapse = problems(make_run(tmp_path / "a", BEHAVIOURS["entropy-collapse"]))[0]
    assert "entropy fell by 9" in collapse.evidence[0] and "8 of 8 prompts got the same response" in collapse.evidence[2]
    (verifier,) = problems(make_run(tmp_path / "b", BEHAVIOURS["broken-verifier"]))
    assert "“counting”" in verifier.title and "math" not in verifier.title and "written exactly like the solution" in verifier.evidence[0]
    template = problems(make_run(tmp_path / "c", BEHAVIOURS["wrong-template"]))[0]
    assert "<|im_start|>" in template.evidence[1] and "none of it" in template.evidence[1]
    (stale,) = problems(make_run(tmp_path / "d", BEHAVIOURS["stale-weights"]))
    assert "took the version's number" in stale.evidence[1]


def test_what_a_cause_brings_about_is_told_with_it() -> None:
    stale = Finding("stale-weights", "Stale", ("the gap grew",), "", (), ())
    collapse = Finding("entropy-collapse", "Collapse", ("entropy fell",), "", (), ())
    assert with_effects(stale, [collapse]).evidence == ("the gap grew", "it may well be why: Collapse (entropy fell)")
    steps = 12
    run = run_of(
        train__entropy_loss=[0.5 * 0.6**i for i in range(steps)], rollout__accuracy=[0.3] * steps,
        train__rollout_logprob_gap_mean=[0.01 * i * i for i in range(steps)],
    )  # fmt: skip
    (found,) = find_problems(run)
    assert found.rule == "stale-weights" and "Entropy collapse" in found.evidence[-1]


def test_a_gap_that_is_that_of_allowed_staleness_is_no_finding() -> None:
    gap = [1e-7, 0.003, 0.02, 0.03, 0.05, 0.05, 0.06, 0.06]
    assert find_problems(run_of(train__rollout_logprob_gap_mean=gap, rollout__staleness_max=[0.0] + [2.0] * 7)) == []
    (found,) = find_problems(run_of(train__rollout_logprob_gap_mean=gap, rollout__staleness_max=[0.0] * 8))
    assert found.rule == "stale-weights"


def test_groups_of_one_kind_are_no_news_to_estimators_that_compare_across_prompts() -> None:
    run = run_of(rollout__groups_all_wrong=[0.6] * 6, rollout__groups_all_right=[0.4] * 6)
    assert [f.rule for f in find_problems(run)] == ["no-signal"]
    run.config = {"algorithm.adv_type": "gae"}
    assert find_problems(run) == []


def test_versions_that_fall_behind_are_stale_weights(tmp_path: Path) -> None:
    (stale,) = problems(make_run(tmp_path, Behaviour(HEALTHY.answer, version=lambda step: min(step - 1, 20))))
    assert stale.rule == "stale-weights" and "in step 30 from version 20, 9 behind" in stale.evidence[0]


def test_entropy_that_falls_because_the_policy_learned_is_no_collapse(tmp_path: Path) -> None:
    """As in the quickstart: 0.5 to 0.1 nats in ten steps while accuracy goes from 15 % to 80 %."""
    quick = Behaviour(
        lambda step, task, solution, rng: solve(solution, min(0.9, 0.15 + 0.07 * step), rng),
        entropy=lambda step: max(0.02, 0.55 * 0.83**step),
    )
    assert problems(make_run(tmp_path, quick)) == []


def test_format_that_is_lost_on_the_way(tmp_path: Path) -> None:
    lost = Behaviour(lambda *args: (HEALTHY if args[0] < 15 else BEHAVIOURS["wrong-template"]).answer(*args))
    first = problems(make_run(tmp_path, lost))[0]
    assert first.rule == "lost-format" and "as few as 0%" in first.evidence[0] and first.steps[1] in range(13, 18)


def run_of(**columns: list[float]) -> RunData:
    n = len(next(iter(columns.values())))
    return RunData(Path("."), [{"step": i + 1.0} | {name.replace("__", "/"): v[i] for name, v in columns.items()} for i in range(n)])


def test_skipped_updates_and_numbers_that_are_none() -> None:
    assert skipped_updates(run_of(train__minibatches_skipped=[0, 0, 1, 0, 0, 0, 0, 0, 0, 0])) is None
    found = skipped_updates(run_of(train__minibatches_skipped=[0, 1, 1, 0, 1, 0, 2, 0, 0, 0]))
    assert found is not None and "5 mini-batches" in found.evidence[0]
    assert not_finite(run_of(train__loss=[0.1, 0.2])) is None
    assert not_finite(run_of(train__entropy_loss=[0.1, math.nan], train__tokens=[9.0, 0.0])) is None
    found = not_finite(run_of(train__loss=[0.1, math.nan, math.nan]))
    assert found is not None and found.steps == (2,)


def test_entropy_without_accuracy_says_nothing() -> None:
    assert entropy_collapse(run_of(train__entropy_loss=[0.5, 0.1, 0.01, 0.01, 0.01, 0.01])) is None


@pytest.mark.parametrize(
    ("counts", "sign"),
    [
        (TaskCounts(samples=100, right=50, right_unanswered=40), "no answer was found"),
        (TaskCounts(samples=100, right=50, groups=10, contradictory=5), "different numbers"),
        (TaskCounts(samples=100, right=50, undecided=30), "undecided"),
        (TaskCounts(samples=200, right=0, unanswered=10), "none of 200"),
    ],
)
def test_each_sign_of_a_broken_verifier(counts: TaskCounts, sign: str) -> None:
    run = run_of(train__loss=[0.1])
    run.counts = {1: StepCounts({"odd": counts, "math": TaskCounts(samples=100, right=60)})}
    found = broken_verifier(run)
    assert found is not None and len(found.evidence) == 1 and found.evidence[0].startswith("odd: ") and sign in found.evidence[0]
    run.counts = {1: StepCounts({"odd": TaskCounts(samples=39, right_unanswered=39)})}  # too few to say
    assert broken_verifier(run) is None


def row(k: int, extracted: str | None, status: str, solution: str = "\\boxed{7}", prompt: str = "<|x|>q") -> dict:
    return {
        "group_id": f"g{k}",
        "task": "math",
        "prompt": prompt,
        "response": extracted or "",
        "solutions": [solution],
        "extracted": extracted,
        "status": status,
        "versions": [[3, 5], [4, 1]],
    }


def test_counts_of_a_step() -> None:
    rows = [
        row(0, "7", "right"),
        row(0, "8", "right"),
        row(1, "$7$", "wrong"),
        row(1, None, "right"),
        row(2, "1", "wrong", prompt="q"),
        row(2, "1", "wrong", prompt="q"),
    ]
    counts = count_samples(rows, ["<|x|>"])
    task = counts.tasks["math"]
    assert (task.samples, task.right, task.unanswered, task.equal, task.equal_not_right, task.right_unanswered, task.contradictory) == (
        6,
        3,
        1,
        2,
        1,
        1,
        1,
    )
    assert (counts.groups, counts.identical_groups, counts.unmarked, counts.oldest_version) == (3, 1, 1, 3)
    assert plain(" \\boxed{ 1\\,000 }. ") != "1000" == plain("\\boxed{ 1\\,000 }")
    assert number("0.5") is None and number("-12") == -12


def test_steps_in_which_no_token_counted_are_no_collapse_of_the_entropy() -> None:
    nothing = 5 * [math.nan]
    run = run_of(train__entropy_loss=15 * [1.0] + nothing, train__tokens=15 * [9.0] + 5 * [0.0], rollout__accuracy=20 * [0.1])
    assert entropy_collapse(run) is None and not_finite(run) is None and len(run.series("train/entropy_loss")[0]) == 15
