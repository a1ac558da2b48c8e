"""Where the answer is."""

from __future__ import annotations

import time

import pytest

from rlinf.rewards.math.extract import extract, last_box

OPEN = "<｜User｜>What is 6*7?<｜Assistant｜><think>\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"first \boxed{41}, then \boxed{42}", "42"),
        (r"\boxed{42} and \boxed{43", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\fbox{42}", "42"),
        (r"\boxed {42}", "42"),
        (r"\boxed 42", "42"),
        (r"\boxed 42.", "42"),
        (r"$\boxed 42$ is it", "42"),
        (r"\boxed42", "42"),
        (r"\boxed{41 \boxed{42}}", r"41 \boxed{42}"),
        (r"\boxed{\boxed{42}}", r"\boxed{42}"),
        (r"\boxed{41 \boxed{42}", "42"),
        (r"{ \boxed{42}", "42"),
        (r"\} \boxed{42}", "42"),
        ("\\\\boxed{42}", "42"),
        (r"\boxed{}", ""),
        (r"\boxed{42", None),
        (r"\boxed", None),
        ("boxed{42}", None),
        ("42", None),
        (r"\boxed{a}} b", "a"),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, answer: str | None) -> None:
    assert last_box(text) == answer


@pytest.mark.parametrize(
    ("prompt", "response", "answer", "route"),
    [
        (OPEN, r"so \boxed{41} </think> \boxed{42}", "42", ""),
        (OPEN, r"so \boxed{42}", None, "no_answer"),
        (OPEN, r"so \boxed{42} </think> I do not know", None, "no_box"),
        (OPEN, r"\boxed{1} </think> \boxed{2} <think> \boxed{3}", None, "no_answer"),
        (OPEN, r"\boxed{1} </think> \boxed{2} </think> \boxed{3}", "3", ""),
        ("<think> x </think> What?", r"so \boxed{42}", "42", ""),
        ("", r"so \boxed{42}", "42", ""),
        ("", r"<think> \boxed{41} </think> \boxed{42}", "42", ""),
        ("", r"<think> \boxed{42} </think> I do not know", None, "no_box"),
        ("", r"<think> \boxed{42}", None, "no_answer"),
        ("", "the answer is 42", None, "no_box"),
        ("", "", None, "no_box"),
    ],
)
def test_only_text_after_the_thinking_counts(prompt: str, response: str, answer: str | None, route: str) -> None:
    assert extract(response, prompt) == (answer, route)


def test_the_final_number_counts_only_when_asked_for() -> None:
    assert extract("so 41, no: 1,042.5 it is", answer_format="boxed_or_final_number").answer == "1,042.5"
    assert extract(r"\boxed{7} of 9", answer_format="boxed_or_final_number").answer == "7"
    assert extract("none", answer_format="boxed_or_final_number").answer is None


def test_extraction_is_linear() -> None:
    started = time.perf_counter()
    for text in (
        "\\boxed{" * 140_000,
        "{" * 1_000_000,
        "\\boxed{1}" * 110_000,
        "\\" * 1_000_000,
        "\\boxed " * 140_000,
        "\\boxed{ " + " " * 10**6,
    ):
        last_box(text)
    assert time.perf_counter() - started < 5
