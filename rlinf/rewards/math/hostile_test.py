"""Inputs that hang, crash or fool other verifiers: each is decided, or undecided in time, and none of them is right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinf.rewards.math.decide import judge_cheap
from rlinf.rewards.verifier import Item, Verifier

HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "tower_of_two": "2^{2^{40}}",
    "huge_power": "7^{123456789}",
    "factorials": "10!!!!",
    "nested_factorial": "((50!)!)!",
    "giant_binomial": r"\binom{1000000}{500000}",
    "long_sum": r"\sum_{k=1}^{1000000000} \frac{1}{k^2}",
    "parentheses": "(" * 3000 + "1" + ")" * 3000,
    "open_parentheses": "(" * 3000,
    "twenty_thousand_digits": "9" * 20_000,
    "million_digits": "9" * 1_000_000,
    "root_power": r"(\sqrt{2}+\sqrt{3})^{10^7}",
    "big_polynomial": "(" + "+".join(f"x_{{{i}}}" for i in range(40)) + ")^{400}",
    "hard_integral": r"\int_0^1 \sin(\cos(\tan(x^{x^{x}}))) \ln(x^x+\sin x)\,dx",
    "hard_limit": r"\lim_{x\to 0} \frac{\sin(\tan(x))-\tan(\sin(x))}{\arcsin(\arctan(x))-\arctan(\arcsin(x))}",
    "nested_fractions": r"\frac{1}{1+" * 300 + "1" + "}" * 300,
    "nested_roots": r"\sqrt{1+" * 300 + "1" + "}" * 300,
    "long_list": ",".join(str(i) for i in range(3000)),
    "long_symbolic_set": r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(1000)) + r"\}",
    "braces": "{" * 5000 + "5" + "}" * 5000,
    "minus_signs": "-" * 5001 + "5",
    "commas": "," * 5000,
    "spaces": " " * 100_000 + "5" + " " * 100_000 + "6",
    "backslashes": "\\" * 10_001,
    "long_word": "a" * 100_000,
    "long_words": "word " * 1000,
    "text_groups": r"\text{" * 500 + "5" + "}" * 500,
    "exponent": "1e999999999",
    "negative_exponent": "10^{-999999999}",
    "small_exponent": "1e-9999",
    "deep_subscript": "x_{" * 1000 + "1" + "}" * 1000,
    "bars": "|" * 2001,
    "dots": "0." + "3" * 4000 + r"\ldots",
    "repeating": "0.1" + r"\overline{" + "3" * 3000 + "}",
    "separators": "1 and or and or 2",
    "nul": "5\x00",
    "surrogate": "5\ud800",
    "right_to_left": "\u202e24",
    "zero_division": r"\frac{1}{0}",
    "log_zero": r"\ln 0",
    "zero_power": "0^{-1}",
    "code": "__import__('os').system('true')",
    "big_matrix": r"\begin{pmatrix}" + r"\\".join("&".join(["x"] * 60) for _ in range(60)) + r"\end{pmatrix}",
    "intervals": r"\cup".join(f"({i},{i + 1})" for i in range(2000)),
    "gcd": r"\gcd(10^{5000}, 7^{5000})",
    "alternating": "1/" * 2000 + "3",
    "ratio": ":".join(["1"] * 5000),
    "plus_minus": r"\pm 1" + r"\pm 1" * 500,
}
LIMIT = 2.5  # seconds: the 1 that a verdict may take, and what a busy machine adds before the clock is looked at
GOLDS = ["42", r"\frac{1}{2}", r"2\sqrt{3}", "x^2+1", r"\{1,2\}", "(1,2)", "[0,1)", r"\text{east}"]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(num_processes=2) as v:
        yield v


def test_every_hostile_input_is_decided_in_time_and_the_batch_is_unaffected(verifier: Verifier) -> None:
    innocent = [Item(f"\\boxed{{\\sqrt{{{3 * i * i}}}}}", (f"{i}\\sqrt{{3}}",)) for i in range(2, 2 + len(HOSTILE))]
    hostile = [Item(f"\\boxed{{{text}}}", (GOLDS[i % len(GOLDS)],)) for i, text in enumerate(HOSTILE.values())]
    verdicts = verifier.verify_many([item for pair in zip(hostile, innocent) for item in pair])
    for name, verdict in zip(HOSTILE, verdicts[::2]):
        assert verdict.status.value != "right", name
        assert verdict.seconds <= LIMIT, (name, verdict.route, verdict.seconds)
    assert all(v.status.value == "right" for v in verdicts[1::2])
    for pid in verifier.worker_pids():
        peak = int(Path(f"/proc/{pid}/status").read_text().split("VmPeak:")[1].split()[0])
        assert peak <= 1 << 20  # KiB


def nested_products(depth: int) -> str:
    text = "x"
    for _ in range(depth):
        text = f"2\\frac{{{text}}}{{x}}"
    return text


PRIMES = [p for p in range(2, 500) if all(p % q for q in range(2, p))]
COSTLY = {  # doubled their work with every level, or tested a bound too late, in the process that also trains
    "chain_of_letters": "/".join("x" * 40) + "=5",
    "zeros_before_dots": "0." + "0" * 4900 + r"1\ldots",
    "sum_of_powers": "+".join(f"{p}^{{-{19900 // (p.bit_length() + 1)}}}" for p in PRIMES),
    "many_braces": "{" * 2490 + "5" + "}" * 2490,
    "nested_products": nested_products(38),
    "many_inequalities": ",".join(f"{i}<x<{i + 1}" for i in range(1, 331)),
}


@pytest.mark.parametrize("name", COSTLY)
def test_no_box_costs_its_own_process_a_second(name: str) -> None:
    started = time.process_time()
    for gold in ("42", "(1,2)", "x^2"):
        decision = judge_cheap(COSTLY[name], (gold,))
        assert decision is None or decision.status != "right"
    assert time.process_time() - started < 1


def test_a_hostile_gold_is_no_excuse(verifier: Verifier) -> None:
    for name in ("tower", "giant_binomial", "parentheses", "root_power", "nested_fractions", "million_digits"):
        verdict = verifier.verify("\\boxed{42}", [HOSTILE[name]])
        assert verdict.status.value != "right" and verdict.seconds <= LIMIT, name


def test_a_response_of_a_million_characters_is_read_in_time(verifier: Verifier) -> None:
    filler = "We note that {x} and \\{y\\} hold. \\boxed{1} " * 22_000
    for text in (
        filler + "\\boxed{42}",
        "\\boxed{" * 140_000 + "\\boxed{42}",
        "\\boxed{42}" + "}" * 1_000_000,
        "<think>" * 100_000 + "</think>\\boxed{42}",
    ):
        verdict = verifier.verify(text, ["42"])
        assert verdict.status.value == "right" and verdict.seconds <= LIMIT
    assert verifier.verify("\\boxed{" * 140_000 + "42", ["42"]).route == "no_box"


HACKS = {
    "several_in_one_box": (r"\boxed{1 or 2 or 3}", "2"),
    "several_in_one_box_by_comma": (r"\boxed{1, 2, 3}", "2"),
    "several_boxes": (r"\boxed{2} \boxed{3}", "2"),
    "empty_box": (r"\boxed{}", "2"),
    "blank_box": (r"\boxed{ \, }", "2"),
    "no_box": ("The answer is 2.", "2"),
    "phrase_against_box": (r"\boxed{41} so the final answer is 42", "42"),
    "unclosed": (r"\boxed{2", "2"),
    "gold_in_thinking": (r"<think> \boxed{2} </think> I do not know.", "2"),
    "gold_in_open_thinking": (r"<think> so \boxed{2}", "2"),
    "interval_for_all": (r"\boxed{(-\infty, \infty)}", "2"),
    "any_number": (r"\boxed{x}", "2"),
    "range": (r"\boxed{1 \le x \le 3}", "2"),
    "set": (r"\boxed{\{1,2,3\}}", "2"),
    "plus_minus": (r"\boxed{\pm 2}", "2"),
    "look_alike_digit": (r"\boxed{２}", "2"),
    "arabic_digit": ("\\boxed{٢}", "2"),
    "mathematical_digit": (r"\boxed{𝟐}", "2"),
    "circled_digit": (r"\boxed{②}", "2"),
    "roman_digit": (r"\boxed{Ⅱ}", "2"),
    "cyrillic_letter": (r"\boxed{В}", "B"),
    "superscript": (r"\boxed{4²}", "42"),
    "nested": (r"\boxed{3 \boxed{2}}", "2"),
    "letters_in_another_order": (r"\boxed{\text{seat}}", r"\text{east}"),
    "all_choices": (r"\boxed{A B C D}", "B"),
    "all_choices_labelled": (r"\boxed{(A) (B) (C) (D)}", "B"),
    "negation": (r"\boxed{\text{not } 2}", "2"),
    "chain": (r"\boxed{x = 1 = 2}", "2"),
    "approximately": (r"\boxed{x \approx 1 \approx 2}", "2"),
    "question_mark": (r"\boxed{2?}", "2"),
    "json": (r'\boxed{"answer": 2}', "2"),
    "comment": (r"\boxed{3 % 2}", "2"),
    "zero_width": ("\\boxed{1\u200b2}", "2"),
    "the_word": (r"\boxed{\text{correct}}", "2"),
    "gold_name": (r"\boxed{\text{gold}}", "2"),
    "brace": (r"\boxed{\{}", "2"),
    "tautology": (r"\boxed{0=0}", "y=2x+1"),
    "identity": (r"\boxed{x=x}", "x=2"),
    "unsolved": (r"\boxed{2x=4}", "x=2"),
    "free_sign": (r"\boxed{2 \cdot s}", "2"),
}


@pytest.mark.parametrize("name", HACKS)
def test_reward_hacking_patterns_are_never_right(verifier: Verifier, name: str) -> None:
    response, gold = HACKS[name]
    assert verifier.verify(response, [gold]).status.value != "right"


@pytest.mark.parametrize(
    ("answer", "prompt", "gold", "right"),
    [
        ("23+45", "Q: 23+45=?\nA:", "68", False),
        ("23 + 45", "What is $23+45$?", "68", False),
        ("68", "Q: 23+45=?\nA:", "68", True),
        ("6 \\times 7", "Compute 6 \\times 7.", "42", False),
        ("\\frac{10}{4}", "Simplify $\\frac{10}{4}$.", "\\frac{5}{2}", False),
        ("\\frac{5}{2}", "Is $\\frac{5}{2}$ in lowest terms? Give it.", "\\frac{5}{2}", True),
        ("2^{10}", "Write 1024 as a power of two.", "1024", True),
        ("-5", "What is 3-5-3?", "-5", True),
        ("(23+45)", "What is 23+45?", "68", False),
        ("{23+45}", "What is 23+45?", "68", False),
        ("=23+45", "What is 23+45?", "68", False),
        ("23+45.", "What is 23+45?", "68", False),
        ("+23+45", "What is 23+45?", "68", False),
        ("23\\,+\\,45", "What is 23+45?", "68", False),
        ("x=23+45", "What is 23+45?", "68", False),
        ("\\text{23+45}", "What is 23+45?", "68", False),
        ("\\left(23+45\\right)", "What is 23+45?", "68", False),
        ("23+45 \\text{ apples}", "What is 23+45?", "68", False),
        ("23+45 apples", "Ann has 23+45 apples. How many?", "68", False),
        ("23+45=68", "What is 23+45?", "68", True),
        ("\\frac{10}{4}", "Simplify $\\dfrac{10}{4}$.", "\\frac{5}{2}", False),
        ("10/4", "Simplify $\\frac{10}{4}$.", "\\frac{5}{2}", False),
        ("6\\cdot 7", "Compute $6\\times 7$.", "42", False),
        ("2^10", "Compute $2^{10}$.", "1024", False),
        ("5!", "Compute $5!$.", "120", False),
        ("|-5|", "Compute $|-5|$.", "5", False),
        ("10:4", "Simplify the ratio 10:4.", "5:2", False),
        ("\\int_0^1 x\\,dx", "Compute $\\int_0^1 x dx$.", "\\frac{1}{2}", False),
        ("\\lfloor 3.7 \\rfloor", "Evaluate $\\lfloor 3.7\\rfloor$.", "3", False),
        ("\\log_2 8", "Evaluate $\\log_2 8$.", "3", False),
        ("\\gcd(12,18)", "Compute $\\gcd(12,18)$.", "6", False),
        ("(x+1)^2", "Expand $(x+1)^2$.", "x^2+2x+1", False),
        ("2x-y+1=0", "Solve $2x-y+1=0$ for $y$.", "y=2x+1", False),
        ("5\\text{ million}", "Of the 5 million people, all came. How many?", "5000000", True),
        ("1/2", "A coin lands heads with probability 1/2. And tails?", "\\frac{1}{2}", True),
        ("\\frac{1}{2}", "The slope is $\\frac{1}{2}$ or $2$. Which?", "\\frac12", True),
        ("1/2", "Choose: (A) 1/2 (B) 1/3", "\\frac12", True),
        ("x=2", "Is x=2 or x=3 a root of x^2-4?", "2", True),
        ("(-1,1)", "On which of (-1,1) and (1,2) is f decreasing?", "-1<x<1", True),
        ("[0,2\\pi)", "Solve it for $x$ in $[0,2\\pi)$.", "0 \\le x < 2\\pi", True),
        ("3+4i", "Is $3+4i$ or $4+3i$ a root?", "3 + 4 i", True),
        ("x^2+1", "Which is irreducible: $x^2+1$ or $x^2-1$?", "1+x^2", True),
        ("2^{10}", "Is $2^{10}$ or $3^7$ larger?", "2^10", True),
    ],
)
def test_the_box_of_the_question_earns_nothing(verifier: Verifier, answer: str, prompt: str, gold: str, right: bool) -> None:
    assert (verifier.verify(f"\\boxed{{{answer}}}", [gold], prompt=prompt).status.value == "right") is right
