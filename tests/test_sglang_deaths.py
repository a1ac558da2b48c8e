"""SGLang's processes and its workers are killed again and again, on CPU: no sample is lost or doubled, and what was decoded is kept."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.workers.rollout import unfinished
from tests.sglang_here import needs_sglang, small_server
from tests.test_engine_contract import prompt
from tests.test_engine_restarts import SHAPE, newest_pid, stop, wait_for
from tests.test_run_ends import Running
from tests.test_sglang import BACKEND
from tests.tiny import make_tiny_model

pytestmark = list(needs_sglang)

PROCESSES = {"scheduler": "sglang::scheduler", "server": "sglang.launch_server", "worker": ""}  # a word of the victim's command line
MODES = {
    "in turns": (3, {}),
    "ahead, carried over": (2, {"algorithm__schedule": "wallclock", "algorithm__max_staleness": 1, "rollout__partial": True,
                                "algorithm__loss_type": "decoupled-ppo"}),
}  # fmt: skip


async def generate(engine: SGLangEngine, request: GenerateRequest) -> list[Sample]:
    return sorted([s async for s in engine.generate(request)], key=lambda s: request.sample_ids.index(s.sample_id))


def test_what_a_killed_scheduler_has_decoded_is_gone_on_with(tmp_path: Path) -> None:
    """The samples that the death cut short begin the final ones, which are those of an engine that nobody killed; every token has its
    version, and the log-probability that the policy gives it."""
    model = make_tiny_model(tmp_path / "model")
    greedy = GenerateRequest("g", prompt(8), 2, SamplingParams(temperature=0.0), Stop(), 600)
    engine = small_server(model, 1000)
    whole = asyncio.run(generate(engine, greedy))

    async def cut_short() -> list[Sample]:
        engine._server.on_death = lambda: None  # as a worker that is restarted asks for it
        task = asyncio.create_task(generate(engine, greedy))
        while sum(len(a.token_ids) for a in engine._arriving()) < 100:
            await asyncio.sleep(0.002)
        (victim,) = [p.pid for p in children(engine._server.process.pid) if "scheduler" in p.name() or "scheduler" in " ".join(p.cmdline())]
        os.kill(victim, signal.SIGKILL)
        return await task

    partial = asyncio.run(cut_short())
    engine.close()
    assert all(s.finish is Finish.ABORT and s.versions == ((0, len(s)),) for s in partial)
    assert sum(map(len, partial)) >= 100 and all(16 <= len(s) < 600 for s in partial)
    assert all(np.array_equal(s.token_ids, w.token_ids[: len(s)]) for s, w in zip(partial, whole, strict=True))

    other = small_server(model, 1000)
    rest = asyncio.run(generate(other, unfinished(greedy, Group("g", Prompt("p", prompt(8), "math", ("1",)), tuple(partial)))))
    joined = [a.continued_by(b) for a, b in zip(partial, rest, strict=True)]
    expected = asyncio.run(other.sequence_logprobs([np.concatenate([prompt(8), w.token_ids]) for w in whole]))
    other.close()
    for sample, w, logprobs in zip(joined, whole, expected, strict=True):
        assert np.array_equal(sample.token_ids, w.token_ids) and sample.versions == ((0, 600),) and sample.finish is Finish.LENGTH
        assert np.abs(sample.rollout_logprobs - logprobs[-600:]).max() <= 1e-4


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def victim_of(running: Running, rank: int, kind: str) -> int:
    worker = newest_pid(running, rank)
    return next((p.pid for p in children(worker) if PROCESSES[kind] and PROCESSES[kind] in " ".join(p.cmdline())), worker)


def rows(folder: Path, kind: str, steps: list[dict]) -> list[dict]:
    files = [folder / f"logs/tiny/samples/{kind}_{m['step']:06.0f}.jsonl" for m in steps]
    return [json.loads(line) for file in files for line in file.open()]


def versions(running: Running) -> set[str]:
    return {p.name for p in Path("/dev/shm").glob(f"rlinf-{running.run_id}-*-v*")}


def wait_for_weights_on_their_way(running: Running) -> None:
    """Return when a new version has just been written, which the engines are about to load."""
    before, deadline = versions(running), time.monotonic() + 60
    while not versions(running) - before:
        assert running.process.poll() is None and time.monotonic() < deadline, running.last_words()
        time.sleep(0.001)


def moments(rounds: int, seed: int) -> Iterator[list[tuple[str, str, float]]]:
    """For each engine (victim, moment, seconds after it), round after round."""
    rng = random.Random(seed)
    kinds = rng.sample([*PROCESSES] * 4, 2 * rounds)
    for i in range(rounds):
        moment = "a weight sync" if i % 2 else "any time"
        yield [(kinds.pop(), moment, rng.random() * (0.08 if i % 2 else 1.5)) for _ in range(2)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
def test_deaths_of_scheduler_server_and_worker_lose_and_double_nothing(tmp_path: Path, mode: str) -> None:
    """Ten deaths in the two runs, of both engines in each round."""
    rounds, words = MODES[mode]
    shape = SHAPE | {"algorithm__sampling_params": {"max_new_tokens": 48}, "runner__seq_length": 96}
    running = Running(tmp_path, patience=400, rollout__max_engine_restarts=10, **shape | BACKEND | words)
    killed = 0
    for plan in moments(rounds, seed=len(mode)):
        for rank, (kind, moment, seconds) in enumerate(plan):
            if moment == "a weight sync":
                wait_for_weights_on_their_way(running)
            time.sleep(seconds)
            print(f"engine {rank}: {kind}, {seconds:.3f} s after {moment}")  # noqa: T201  # for a failure
            os.kill(victim_of(running, rank, kind), signal.SIGKILL)
            killed += 1
        wait_for(running, tmp_path, "rollout/engine_restarts", killed)
    steps = wait_for(running, tmp_path, "step", wait_for(running, tmp_path, "step", 0)[-1]["step"] + 3)
    stop(running)
    eta = words.get("algorithm__max_staleness", 0)
    assert steps[-1]["rollout/engine_restarts"] == killed and all(m["rollout/staleness_max"] <= eta for m in steps)
    assert all(m["rollout/samples"] == 16 and m["train/grad_norm"] > 0 for m in steps)
    assert eta or all(m["train/rollout_logprob_gap_max"] <= 1e-4 for m in steps)
    trained = rows(tmp_path, "tokens", steps)
    assert len(trained) == len({r["sample_id"] for r in trained}) == 16 * len(steps)
    files = (tmp_path / "logs/tiny/samples").glob("step_*.jsonl")  # a group is in the file of the step that it was begun for
    decoded = {r["sample_id"]: r for file in files for r in map(json.loads, file.open())}
    for m in steps:
        for r in (decoded[row["sample_id"]] for row in rows(tmp_path, "tokens", [m])):
            assert sum(n for _, n in r["versions"]) == r["length"] and all(0 <= m["step"] - 1 - v <= eta for v, _ in r["versions"]), r
    assert not eta or (any(m["rollout/staleness_max"] == eta for m in steps) and any(m["rollout/carried_over"] > 0 for m in steps))
