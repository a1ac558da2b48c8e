"""The generated task: distinct problems, a held-out split, examples that give nothing away."""

import json
from pathlib import Path

import pytest

from rlinf.config.schema import DataConfig
from rlinf.data.arithmetic import PROBLEMS, SHOTS, generate
from rlinf.data.prompts import load_prompts
from rlinf.data.tokenizer import load_tokenizer
from rlinf.data.tokenizer_test import make_folder
from rlinf.errors import UserError


def terms(record: dict) -> tuple[int, ...]:
    asked = record["prompt"].rsplit("Q: ", 1)[1]
    return tuple(int(x) for x in asked.split("=?")[0].split("+"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_problems_are_distinct_and_held_out_and_solutions_are_right(tmp_path: Path) -> None:
    paths = generate(tmp_path, 1300, 256, seed=0)
    train, val = read(paths["train"]), read(paths["val"])
    problems = [frozenset((min(t), max(t))) if len(set(t)) == 2 else t for t in map(terms, train + val)]
    assert (len(train), len(val), len(set(problems))) == (1300, 256, 1556)
    assert len({r["query_id"] for r in train + val}) == 1556
    for record in train + val:
        assert record["solutions"] == [f"\\boxed{{{sum(terms(record))}}}"] and record["task"] == "math"


def test_no_example_is_asked_and_none_shows_the_answer(tmp_path: Path) -> None:
    for record in read(generate(tmp_path, len(PROBLEMS) - 1, 1, seed=3)["train"]):
        a, b = terms(record)
        assert a + b not in {sum(shot) for shot in SHOTS}
        assert record["prompt"].count("\\boxed{") == len(SHOTS) and (a, b) not in SHOTS and (b, a) not in SHOTS


def test_the_files_depend_on_the_seed_alone(tmp_path: Path) -> None:
    once, again, other = (generate(tmp_path / name, 50, 10, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [p.read_bytes() for p in once.values()] == [p.read_bytes() for p in again.values()]
    assert once["train"].read_bytes() != other["train"].read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["train.jsonl", "val.jsonl"]


def test_the_loader_takes_every_line(tmp_path: Path) -> None:
    paths = generate(tmp_path / "data", 200, 20, seed=0)
    (tmp_path / "model").mkdir()
    prompts, report = load_prompts([str(p) for p in paths.values()], DataConfig(), load_tokenizer(str(make_folder(tmp_path / "model"))))
    assert (report.kept, report.duplicates_renamed, len({p.prompt_id for p in prompts})) == (220, 0, 220)


@pytest.mark.parametrize("n_train, n_val", [(len(PROBLEMS), 1), (0, 10), (10, 0)])
def test_more_problems_than_there_are(tmp_path: Path, n_train: int, n_val: int) -> None:
    with pytest.raises(UserError, match="at most"):
        generate(tmp_path, n_train, n_val, seed=0)
