"""Public layouts of the benchmarks, on small made-up files, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from rlinf.errors import UserError
from rlinf.evaluation.convert import GPQA_CHOICES, LETTERS, convert, shuffled_choices

GPQA_ROWS = [
    {"Record ID": f"rec{i}", "Question": f"Which of the following, question {i}?", GPQA_CHOICES[0]: f"right {i}",
     GPQA_CHOICES[1]: f"wrong {i}a", GPQA_CHOICES[2]: f"wrong {i}, b", GPQA_CHOICES[3]: f'wrong "{i}" c'}
    for i in range(198)
]  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def converted(benchmark: str, source: Path, seed: int = 1234) -> list[dict]:
    out = source.with_name("out.jsonl")
    convert(benchmark, source, out, seed)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("benchmark", "row", "prompt", "solution"),
    [
        ("aime24", {"id": 60, "problem": "P", "solution": "so \\boxed{204}", "answer": "204", "url": "u", "year": "2024"}, "P", "204"),
        ("aime24", {"ID": "2024-I-4", "Problem": "P", "Solution": "long", "Answer": 25}, "P", "25"),
        ("aime24", {"id": 0, "problem": "P", "solution": "\\boxed{073}", "url": "u"}, "P", "73"),
        ("aime25", {"question": "P", "answer": "588"}, "P", "588"),
        ("aime25", {"problem_idx": 1, "problem": "P", "answer": 0}, "P", "0"),
        ("aime25", {"problem": "P", "answer": "336^\\circ"}, "P", "336"),
        ("math500", {"problem": "P", "solution": "x", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "s", "level": 2,
                     "unique_id": "test/a/1.json"}, "P", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("gsm8k", {"question": "Q", "answer": "16 - 3 <<16-3=13>>\n#### 13"}, "Q", "13"),
        ("gsm8k", {"question": "Q", "answer": "…\n#### 2,125"}, "Q", "2125"),
        ("gpqa_diamond", {"problem": "Q\nA. one\nB. two\nC. three\nD. four", "solution": "\\boxed{C}"},
         "Q\nA. one\nB. two\nC. three\nD. four", "C"),
        ("gpqa_diamond", {"question": "Q\n(A) one\n(B) two\n(C) three\n(D) four\nA) 1\nB) 2\nC) 3\nD) 4", "answer": "(b)"},
         "Q\n(A) one\n(B) two\n(C) three\n(D) four\nA) 1\nB) 2\nC) 3\nD) 4", "B"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_public_layouts(tmp_path: Path, benchmark: str, row: dict, prompt: str, solution: str, suffix: str) -> None:
    source = write(tmp_path / f"in{suffix}", [row])
    (record,) = converted(benchmark, source)
    assert record["prompt"] == prompt and record["solutions"] == [f"\\boxed{{{solution}}}"]
    assert record["task"] == ("choice" if benchmark == "gpqa_diamond" else "math")
    assert record["source"] == {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "row": 1}


def test_ids_come_from_the_file_or_the_row_number(tmp_path: Path) -> None:
    rows = [{"id": 7, "problem": "P", "answer": 1}, {"problem": "Q", "answer": 2}]
    assert [r["query_id"] for r in converted("aime24", write(tmp_path / "in.jsonl", rows))] == ["aime24-7", "aime24-1"]


def test_parquet_is_read_like_the_rest(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; Parquet files need it")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"problem": "P", "answer": "12"}]), tmp_path / "in.parquet")
    assert converted("aime25", tmp_path / "in.parquet")[0]["solutions"] == ["\\boxed{12}"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        convert("aime25", tmp_path / "bad.parquet", tmp_path / "out")


def test_gpqa_options_are_a_permutation_and_the_letters_are_even(tmp_path: Path) -> None:
    records = converted("gpqa_diamond", write(tmp_path / "gpqa_diamond.csv", GPQA_ROWS))
    golds = Counter()
    for row, record in zip(GPQA_ROWS, records):
        question, *options = record["prompt"].split("\n")
        letter = record["solutions"][0][7]
        golds[letter] += 1
        assert question == row["Question"] and [o[:3] for o in options] == ["A. ", "B. ", "C. ", "D. "]
        assert sorted(o[3:] for o in options) == sorted(row[name] for name in GPQA_CHOICES)
        assert options[LETTERS.index(letter)][3:] == row[GPQA_CHOICES[0]]
    expected = 198 / 4
    assert sum((golds[x] - expected) ** 2 / expected for x in LETTERS) < 7.81  # chi-square, 3 degrees of freedom, 5 %


def test_the_order_of_options_depends_on_seed_and_question_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", GPQA_ROWS[:40])
    first, again, other = converted("gpqa_diamond", source), converted("gpqa_diamond", source), converted("gpqa_diamond", source, seed=7)
    assert first == again and [r["prompt"] for r in first] != [r["prompt"] for r in other]
    backwards = converted("gpqa_diamond", write(tmp_path / "in.csv", GPQA_ROWS[:40][::-1]))
    assert [r["prompt"] for r in backwards[::-1]] == [r["prompt"] for r in first]
    assert {shuffled_choices(str(q), list("wxyz"), 0)[1] for q in range(40)} == set(LETTERS)


def test_the_report_counts_letters_and_warns_of_a_partial_set(tmp_path: Path) -> None:
    report = convert("gpqa_diamond", write(tmp_path / "in.csv", GPQA_ROWS), tmp_path / "out.jsonl")
    assert report["problems"] == 198 == sum(report["answers"].values()) and "warning" not in report
    report = convert("aime24", write(tmp_path / "in.jsonl", [{"problem": "P", "answer": 1}]), tmp_path / "out.jsonl")
    assert report["warning"] == "the published aime24 has 30 problems"


@pytest.mark.parametrize(
    ("benchmark", "name", "content", "words"),
    [
        ("aime23", "a.jsonl", "{}", ["aime23: no such benchmark", "gsm8k"]),
        ("aime24", "a.jsonl", "", ["a.jsonl: holds no list of problems"]),
        ("aime24", "a.txt", "{}", ["a.txt: give a .jsonl, .json, .csv or .parquet file"]),
        ("aime24", "a.jsonl", '{"problem": "P", "answer": 1}\n{"problem"', ["a.jsonl, line 2: not JSON", "fetch the file again"]),
        ("aime24", "a.json", '[{"problem": \n', ["a.json, line", "not JSON"]),
        ("aime24", "a.json", '{"problem": "P"}', ["a.json: holds no list of problems"]),
        ("aime24", "a.jsonl", "3", ["a.jsonl, row 1: not an object"]),
        ("aime24", "a.jsonl", '{"text": "P", "answer": 1}', ["row 1: no question", "the row has text, answer"]),
        ("aime24", "a.jsonl", '{"problem": "P"}', ["row 1: no answer", "the row has problem"]),
        ("aime24", "a.jsonl", '{"problem": "P", "answer": "1000"}', ["row 1: the answer '1000' is no integer from 0 to 999"]),
        ("aime25", "a.jsonl", '{"problem": "P", "answer": "1/2"}', ["is no integer"]),
        ("aime24", "a.jsonl", '{"problem": "P \\ud800", "answer": 1}', ["a.jsonl, row 1: holds half a surrogate pair"]),
        ("aime24", "a.jsonl", f'{{"problem": "P", "answer": {"9" * 5000}}}', ["a.jsonl, line 1: not readable (Exceeds"]),
        ("aime24", "a.jsonl", "[" * 100000, ["a.jsonl, line 1: not readable ("]),
        ("aime24", "a.json", f'[{{"problem": "P", "answer": {"9" * 5000}}}]', ["a.json: cannot be read as json text (Exceeds"]),
        ("aime24", "a.json", "[" * 100000, ["a.json: cannot be read as json text ("]),
        ("math500", "a.jsonl", json.dumps({"problem": "P", "answer": "\\frac{1}{2"}), ["row 1: the answer '", "unbalanced braces"]),
        ("math500", "a.jsonl", json.dumps({"problem": "P", "answer": "1}{2"}), ["row 1: the answer '1}{2' has unbalanced braces"]),
        ("math500", "a.jsonl", '{"question": "Q", "answer": "so\\n#### 1"}', ["row 1: the answer is a GSM8K solution", "mean gsm8k?"]),
        ("gsm8k", "a.jsonl", '{"question": "Q", "answer": "so it is many"}', ["does not end with `#### NUMBER`"]),
        ("gpqa_diamond", "a.jsonl", '{"question": "Q", "answer": "right"}', ["the answer 'right' is no letter of ABCD"]),
        ("gpqa_diamond", "a.jsonl", '{"question": "Q without options", "answer": "A"}', ["does not list its options"]),
        ("gpqa_diamond", "a.csv", "Question,Correct Answer,Incorrect Answer 1\nQ,x,y\n", ["`Incorrect Answer 2` is missing"]),
        ("gpqa_diamond", "a.jsonl", json.dumps({"question": "Q\nA. 1\nB. 2\nC. 3\nD. 4", "answer": "A"}) + "\n", []),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, benchmark: str, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content * (1 if words else 25))
    with pytest.raises(UserError) as error:
        convert(benchmark, tmp_path / name, tmp_path / "out.jsonl")
    for word in words or ["every answer is \\boxed{A}", "never shuffled"]:
        assert word in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_missing_file_and_missing_pyarrow_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        convert("aime24", tmp_path / "a.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match="is a folder; give the file in it"):
        convert("aime24", tmp_path, tmp_path / "out")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        convert("aime24", tmp_path / "a.parquet", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"problem": "P", "answer": 1}])
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", source / "out.jsonl", source / "a" / "out.jsonl"):
        with pytest.raises(UserError, match=f"{out}: cannot be written .(Is a|Not a|File exists)"):
            convert("aime24", source, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "in.jsonl"]
