"""Scores of held-out problems by hand: several answers to each, in several groups, from several files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlinf.config.algorithm import AlgorithmConfig, SamplingConfig
from rlinf.config.benchmarks import ValidationConfig
from rlinf.data.records import Finish, Group, GroupHeader, Prompt, Sample, Status, Verdict
from rlinf.metrics.names import undocumented
from rlinf.rollout.contract import Stop
from rlinf.runners.requests import validation_requests
from rlinf.runners.validation import ValidationScores, score_validation, validation_metrics

STATUS = {"r": Status.RIGHT, "w": Status.WRONG, "u": Status.UNDECIDED}


def header(name: str, answers: str, lengths: tuple[int, ...]) -> GroupHeader:
    """answers: a letter each, right, wrong or undecided; the longest are cut off, and what is wrong has no box."""
    prompt = Prompt(name, np.array([1], np.int32), "math", ("7",))
    samples = tuple(
        Sample(
            f"{name}/{i}",
            *(np.zeros(n, kind) for kind in (np.int32, np.float32, np.uint8)),
            ((0, n),),
            Finish.LENGTH if n > 8 else Finish.STOP,
        )
        for i, n in enumerate(lengths)
    )
    verdicts = tuple(Verdict(0.0, STATUS[letter], None if letter == "w" else "7", "simple", 0.0) for letter in answers)
    return Group(name, prompt, samples, verdicts).header()


def test_one_greedy_answer_to_each_problem() -> None:
    scores = score_validation([header("a", "r", (4,)), header("b", "w", (9,)), header("c", "u", (2,))], 3)
    assert scores == ValidationScores((1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (4.0, 9.0, 2.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert validation_metrics(scores, ["one"] * 3, 1) == pytest.approx(
        {"eval/accuracy": 1 / 3, "eval/boxed": 2 / 3, "eval/response_length": 5.0, "eval/truncated": 1 / 3, "eval/undecided": 1 / 3}
    )
    assert ValidationScores.from_json(scores.to_json()) == scores


def test_several_answers_from_several_files() -> None:
    """Three answers to each problem, asked for as two and one."""
    first = [header("a", "rw", (1, 3)), header("b", "ww", (2, 2)), header("c", "wu", (9, 9))]
    second = [header("a", "r", (5,)), header("b", "w", (2,)), header("c", "w", (9,))]
    scores = score_validation(first + second, 3)
    assert scores.right == pytest.approx((2 / 3, 0, 0)) and scores.tokens == (3.0, 2.0, 9.0) and scores.truncated == (0, 0, 1)
    assert scores.boxed == pytest.approx((2 / 3, 0, 1 / 3)) and scores.undecided == pytest.approx((0, 0, 1 / 3))
    found = validation_metrics(scores, ["aime", "math", "aime"], 3)
    assert not undocumented(found)
    of = {name: value for name, value in found.items() if name.startswith(("eval/accuracy", "eval/pass"))}
    assert of == pytest.approx(
        {
            "eval/accuracy": 2 / 9, "eval/accuracy/aime": 1 / 3, "eval/accuracy/math": 0.0,
            "eval/pass_at_n": 1 / 3, "eval/pass_at_n/aime": 1 / 2, "eval/pass_at_n/math": 0.0,
        }
    )  # fmt: skip


def test_answers_are_asked_for_in_groups_of_training_and_as_validation_says() -> None:
    prompts = [Prompt(name, np.array([1], np.int32), "math", ("7",)) for name in "ab"]
    algorithm = AlgorithmConfig(group_size=4, sampling_params=SamplingConfig(temperature=0.7, max_new_tokens=50))
    wanted = ValidationConfig(n=10, temperature=0.6, top_p=0.95)
    asked = validation_requests(wanted, algorithm, Stop((2,)), 3, prompts, "file")
    assert [(r.name, r.n) for r in asked] == [
        ("val.3.a", 4), ("val.3.b", 4), ("val1.3.a", 4), ("val1.3.b", 4), ("val2.3.a", 2), ("val2.3.b", 2),
    ]  # fmt: skip
    assert {(r.sampling.temperature, r.sampling.top_p, r.max_new_tokens, r.timer) for r in asked} == {(0.6, 0.95, 50, "validate")}
    assert {(r.stop, r.dump(0), r.dump(1)) for r in asked} == {(Stop((2,)), "file", "file")}
    longer = validation_requests(replace(wanted, max_new_tokens=99), algorithm, Stop(), 3, prompts, "file")
    assert {r.max_new_tokens for r in longer} == {99}
    (greedy, _) = validation_requests(ValidationConfig(), algorithm, Stop(), 0, prompts, "file")
    assert (greedy.n, greedy.sampling.temperature, greedy.max_new_tokens) == (1, 0.0, 50)
