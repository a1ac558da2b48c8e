"""`rlinf data convert BENCHMARK FILE OUT`: converts the public files of a benchmark to the AReaL-boba format.

A record keeps the question as it is (templates are applied later, when the model is known), and says where it came from: file, sha256, row.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.data.jsonl import HALF_A_PAIR, atomic_write, is_unicode, refuse_itself
from rlinf.data.tables import read_rows
from rlinf.errors import UserError
from rlinf.rewards.math.decide import simple_number
from rlinf.rewards.math.extract import last_box
from rlinf.rewards.tasks import letter_of

LETTERS = "ABCD"
GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
QUESTION_FIELDS = ("problem", "Problem", "question", "Question")
ANSWER_FIELDS = ("answer", "Answer", "expected_answer", "solution", "Solution")
ID_FIELDS = ("unique_id", "Record ID", "id", "ID", "problem_idx")
MIN_TO_JUDGE = 20  # records: so many gold letters that are all equal are no chance

Row = Mapping[str, Any]


class _BadRow(Exception):
    """Raised for a row that cannot be converted, with the reason."""


@dataclass(frozen=True)
class Benchmark:
    """How the rows of a benchmark are read: a function from row and seed to (question, answer). problems: how many the published set
    has."""

    task: str
    problems: int
    read: Callable[[Row, int], tuple[str, str]]


def convert(benchmark: str, source: Path, out: Path, seed: int = 1234) -> dict[str, Any]:
    """Write OUT and return what was done. The content of the file depends on the arguments only. Raises UserError that names the first
    bad row."""
    if benchmark not in READERS:
        raise UserError(f"{benchmark}: no such benchmark; known are {', '.join(READERS)}")
    reader = READERS[benchmark]
    refuse_itself(source, out)
    rows = read_rows(source)
    origin = {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, Mapping):
                raise _BadRow("not an object with fields")
            question, answer = reader.read(row, seed)
            record: dict[str, Any] = {
                "prompt": question, "task": reader.task, "query_id": f"{benchmark}-{_field(row, ID_FIELDS) or number - 1}",
                "solutions": [_boxed(answer)], "source": {**origin, "row": number},
            }  # fmt: skip
            if not is_unicode(record):
                raise _BadRow(HALF_A_PAIR)
        except _BadRow as bad:
            raise UserError(f"{source}, row {number}: {bad}") from bad
        records.append(record)
    golds = Counter(r["solutions"][0] for r in records)
    if reader.task == "choice" and len(records) >= MIN_TO_JUDGE and len(golds) == 1:
        raise UserError(
            f"{source}: every answer is {next(iter(golds))}: its options were never shuffled; convert the file with the four answers"
        )
    _write(out, records)
    report = {"file": out, "problems": len(records), "source_sha256": origin["sha256"]}
    if reader.task == "choice":
        report["answers"] = {letter: golds[f"\\boxed{{{letter}}}"] for letter in LETTERS}
    if len(records) != reader.problems:
        report["warning"] = f"the published {benchmark} has {reader.problems} problems"
    return report


def _field(row: Row, names: tuple[str, ...]) -> str:
    """The first of these fields that the row has, as text; empty when it has none."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int, float)) and str(value).strip():
            return str(value).strip()
    return ""


def _question(row: Row) -> str:
    question = _field(row, QUESTION_FIELDS)
    if not question:
        raise _BadRow(f"no question; expected one of {', '.join(QUESTION_FIELDS)}; the row has {', '.join(map(str, row)) or 'nothing'}")
    return question


def _answer(row: Row) -> str:
    """The answer field; if it holds a worked solution, the content of the last box."""
    given = _field(row, ANSWER_FIELDS)
    if not given:
        raise _BadRow(f"no answer; expected one of {', '.join(ANSWER_FIELDS)}; the row has {', '.join(map(str, row)) or 'nothing'}")
    boxed = last_box(given)
    if boxed is None and any(line.lstrip().startswith("####") for line in given.splitlines()):
        raise _BadRow("the answer is a GSM8K solution, which ends with `#### NUMBER`; did you mean gsm8k?")
    return given if boxed is None else boxed.strip()


def _boxed(answer: str) -> str:
    solution = f"\\boxed{{{answer}}}"
    if last_box(solution) != answer:
        raise _BadRow(f"the answer {answer[:80]!r} has unbalanced braces; fix it in the file, or take another copy of it")
    return solution


def _aime(row: Row, seed: int) -> tuple[str, str]:
    answer = _answer(row)
    value = simple_number(answer.removesuffix(r"^\circ").strip("$ "))
    if value is None or value.denominator != 1 or not 0 <= value <= 999:
        raise _BadRow(f"the answer {answer[:80]!r} is no integer from 0 to 999")
    return _question(row), str(value)


def _math500(row: Row, seed: int) -> tuple[str, str]:
    return _question(row), _answer(row)


def _gsm8k(row: Row, seed: int) -> tuple[str, str]:
    answer = _field(row, ("answer",)).rpartition("####")[2].strip().replace(",", "").lstrip("$")
    if simple_number(answer) is None:
        raise _BadRow("the field `answer` does not end with `#### NUMBER`")
    return _question(row), answer


def _gpqa(row: Row, seed: int) -> tuple[str, str]:
    """The four answers are shuffled here; a question that already contains its options is used as it is."""
    if GPQA_CHOICES[0] in row:
        return shuffled_choices(_question(row), [_choice(row, name) for name in GPQA_CHOICES], seed)
    question, letter = _question(row), letter_of(_answer(row))
    if letter is None or letter not in LETTERS:
        raise _BadRow(f"the answer {_answer(row)[:80]!r} is no letter of {LETTERS}")
    if not all(any(line.lstrip("( ").startswith(f"{x}{end}") for line in question.splitlines() for end in ".):") for x in LETTERS):
        raise _BadRow("the question does not list its options, one a line as `A. ...`; and the row has no field `Correct Answer`")
    return question, letter


def _choice(row: Row, name: str) -> str:
    text = _field(row, (name,))
    if not text:
        raise _BadRow(f"the field `{name}` is missing or empty")
    return text


def shuffled_choices(question: str, choices: list[str], seed: int) -> tuple[str, str]:
    """The question with its options as A to D in an order drawn from (seed, question), and the letter of the first one given."""

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{question}\0{index}".encode()).digest()

    order = sorted(range(len(choices)), key=rank)
    lines = [question, *(f"{letter}. {choices[i]}" for letter, i in zip(LETTERS, order))]
    return "\n".join(lines), LETTERS[order.index(0)]


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write the file atomically."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


READERS = {
    "aime24": Benchmark("math", 30, _aime),
    "aime25": Benchmark("math", 30, _aime),
    "gpqa_diamond": Benchmark("choice", 198, _gpqa),
    "math500": Benchmark("math", 500, _math500),
    "gsm8k": Benchmark("math", 1319, _gsm8k),
}
