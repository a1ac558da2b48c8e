"""The reward worker: decodes, judges, shapes and writes down one group."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlinf.config.schema import Config
from rlinf.data.journal import read_groups
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.data.tokenizer import load_tokenizer
from rlinf.scheduling.placement import WorkerAddress
from rlinf.workers.reward import RewardWorker
from tests.tiny import make_tiny_model

FAILS = "ZeroDivisionError: division by zero (mine.py:2)"
ADDRESS = WorkerAddress("reward", 0, 1, 0, (0,), "127.0.0.1", 0, "run", 1)


def group(model: Path, prompt: str, responses: list[str], solutions: tuple[str, ...], name: str = "g0") -> Group:
    tokenizer = load_tokenizer(str(model))

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text), dtype=np.int32)

    samples = []
    for i, text in enumerate(responses):
        t = ids(text)
        samples.append(Sample(f"{name}/{i}", t, np.zeros(len(t), np.float32), np.ones(len(t), np.uint8), ((3, len(t)),), Finish.STOP))
    return Group(name, Prompt("p0", ids(prompt), "math", solutions), tuple(samples))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def worker(model: Path, keep_groups: int = -1, **reward: object) -> RewardWorker:
    config = Config()
    config.runner.keep_groups = keep_groups
    config.rollout.model_dir = str(model)
    for name, value in reward.items():
        setattr(config.reward, name, value)
    return RewardWorker(ADDRESS, config)


def test_parts_of_the_users_own_are_added_and_come_back_from_disk(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(r):\n    return 0.5 if r.right and r.prompt == 'Q' and r.tokens else 1 / 0\n")
    judge, shelf = worker(model, own_parts={"half": f"{tmp_path}/mine.py:half"}, format_reward=1.0), str(tmp_path / "0.safetensors")
    judged = group(model, "Q", ["\\boxed{3}", "\\boxed{2}"], ("3",))
    verdicts = asyncio.run(judge.judge(judged, str(tmp_path / "step_000001.jsonl")))
    judge.keep(shelf, judged, verdicts)
    kept = judge.fetch(shelf)[0].verdicts
    judge.close()
    assert [v.reward for v in verdicts] == [6.5, -4.0] and [v.failed for v in verdicts] == [(), (("half", FAILS),)]
    assert verdicts[0].parts == (("format", 1.0), ("own/half", 0.5)) and verdicts[1].reason.endswith(f"; half: {FAILS}")
    (journalled,) = read_groups(tmp_path / "groups_000001.jsonl")
    assert kept == verdicts == journalled.verdicts
    rows = [json.loads(line) for line in (tmp_path / "step_000001.jsonl").open()]
    assert [row["parts"]["own/half"] for row in rows] == [0.5, 0.0] and rows[1]["reason"] == verdicts[1].reason


def test_an_evaluation_pays_right_and_wrong_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def one(r):\n    return 1\n")
    config = Config()
    config.rollout.model_dir = str(model)
    paid = replace(
        config.reward, own_parts={"one": f"{tmp_path}/mine.py:one"}, format_reward=1.0, overlong_buffer=9, exploration_penalty=1.0
    )
    judged = group(model, "Q", ["\\boxed{3}"], ("3",))
    found = []
    for config.reward in (paid, paid.of_verdicts(), replace(config.reward, four_levels=True).of_verdicts()):
        judge = RewardWorker(ADDRESS, config)
        found += asyncio.run(judge.judge(judged))
        judge.close()
    assert [name for name, _ in found[0].parts] == ["format", "overlong", "exploration", "own/one"]
    assert [v.reward for v in found[1:]] == [5.0, 5.0] and [v.parts for v in found[1:]] == [(), ()]


def test_a_group_from_a_checkpoint_is_written_down_as_when_it_was_judged(model: Path, tmp_path: Path) -> None:
    judge, shelf = worker(model), str(tmp_path / "00000.safetensors")
    before, after = (tmp_path / folder / "step_000001.jsonl" for folder in ("before", "after"))
    judged = group(model, "Q", ["\\boxed{2}", "</think>\\boxed{3}"], ("3",))
    verdicts = asyncio.run(judge.judge(judged, str(before)))
    judge.keep(shelf, judged, verdicts)
    assert judge.fetch(shelf)[0].verdicts == verdicts and not after.exists()
    assert judge.fetch(shelf, str(after))[0].verdicts == verdicts
    judge.close()
    assert after.read_text() == before.read_text()
    assert after.with_name("groups_000001.jsonl").read_text() == before.with_name("groups_000001.jsonl").read_text()


def test_a_group_is_judged_and_written_down(model: Path, tmp_path: Path) -> None:
    judge = worker(model)
    path = tmp_path / "samples" / "step_000001.jsonl"
    groups = [
        group(model, "Q<think>\n", ["a</think>\\boxed{\\sqrt{8}}", "\\boxed{2}", "</think>\\boxed{3}"], ("2\\sqrt{2}",), f"g{k}")
        for k in range(4)
    ]

    async def judge_all() -> list[tuple]:
        return await asyncio.gather(*(judge.judge(g, str(path)) for g in groups))

    for verdicts in asyncio.run(judge_all()):
        assert [(v.status.value, v.route, v.reward) for v in verdicts] == [
            ("right", "numeric", 5.0),
            ("wrong", "no_answer", -5.0),
            ("wrong", "numeric", -5.0),
        ]
    judge.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["sample_id"] for line in lines) == [f"g{k}/{i}" for k in range(4) for i in range(3)]
    first = next(line for line in lines if line["sample_id"] == "g0/0")
    assert first["prompt"] == "Q<think>\n" and first["response"] == "a</think>\\boxed{\\sqrt{8}}" and first["solutions"] == ["2\\sqrt{2}"]
    assert (
        first["finish"] == "stop"
        and first["versions"] == [[3, first["length"]]]
        and first["extracted"] == "\\sqrt{8}"
        and first["parts"] == {}
    )


def test_without_a_path_nothing_is_written_and_parts_are_added(model: Path, tmp_path: Path) -> None:
    judge = worker(model, format_reward=0.5)
    verdicts = asyncio.run(judge.judge(group(model, "Q", ["\\boxed{1}", "1"], ("1",)), None))
    judge.close()
    assert [v.reward for v in verdicts] == [5.5, -5.0]
    assert list(tmp_path.iterdir()) == []


def test_a_trained_group_is_journalled_with_its_verdicts_and_a_validation_group_is_not(model: Path, tmp_path: Path) -> None:
    judge, asked = worker(model), group(model, "Q", ["\\boxed{1}", "1"], ("1",))
    verdicts = asyncio.run(judge.judge(asked, str(tmp_path / "step_000007.jsonl")))
    asyncio.run(judge.judge(asked, str(tmp_path / "validation_000007.jsonl")))
    judge.close()
    (written,) = read_groups(tmp_path / "groups_000007.jsonl")
    assert written.header() == asked.header().with_verdicts(verdicts)
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(written.samples, asked.samples, strict=True))
    quiet = worker(model, keep_groups=0)
    asyncio.run(quiet.judge(asked, str(tmp_path / "step_000008.jsonl")))
    quiet.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "groups_000007.jsonl",
        "step_000007.jsonl",
        "step_000008.jsonl",
        "validation_000007.jsonl",
    ]
