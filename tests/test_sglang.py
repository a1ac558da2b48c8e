"""SGLang on CPU in a whole run, and what happens when a process of its server is killed or an option is wrong."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.cluster.processes import marked
from rlinf.errors import UserError
from rlinf.hardware import EVERYWHERE, free_port
from rlinf.rollout import sglang_server
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.sglang_http import HOST
from rlinf.rollout.sglang_server import command_of, find_interpreter, session_members
from tests.planted import write_data, write_tuned_model
from tests.sglang_here import needs_sglang, small_server
from tests.test_engine_contract import prompt
from tests.test_eval import results, samples, words
from tests.test_run_ends import Running
from tests.tiny import make_tiny_model
from tests.tiny_run import lines, run, write_run

BACKEND = {"rollout__rollout_backend": "sglang", "rollout__seed": 5}


def with_sglang(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_sglang:
        test = mark(test)
    return test


def test_a_missing_environment_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run toolkits/setup/sglang_cpu.sh"):
        find_interpreter(None, cuda=False)
    with pytest.raises(UserError, match="rollout.sglang_python: .*/none"):
        find_interpreter(str(tmp_path / "none"), cuda=False)
    (tmp_path / "sglang-cpu").mkdir()
    (tmp_path / "sglang-cpu" / "rlinf-stamp").touch()
    assert find_interpreter(None, cuda=False) == str(tmp_path / "sglang-cpu" / "bin" / "python")
    with pytest.raises(UserError, match="requirements/gpu.txt"):  # an environment for CPU is none for a GPU
        find_interpreter(None, cuda=True)


@with_sglang
@pytest.mark.parametrize("name", ["no_such_option", "max_queued"], ids=["unknown", "beginning of a name"])
def test_an_unknown_option_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=f"rollout.sglang.*{name.replace('_', '.')}"):
        small_server(model, 64, native={name: "7"})
    assert not list(Path("/dev/shm").glob(f"rlinf-test-{tmp_path.name}*"))


@with_sglang
def test_an_engine_that_holds_no_whole_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 50 tokens, and a sample of runner.seq_length 64 needs 72: raise rollout.sglang.max_total"):
        small_server(make_tiny_model(tmp_path / "model"), 64, native={"max_total_tokens": "50"})
    assert not list(Path("/dev/shm").glob(f"rlinf-test-{tmp_path.name}*"))


@with_sglang
@pytest.mark.parametrize("taken_first", [HOST, EVERYWHERE], ids=["of the front", "of the schedulers"])
def test_a_server_starts_behind_a_proxy_and_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_first: str) -> None:
    """Its warm-up is a request to itself, which the proxy does not answer; another program has taken a port between look and start."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = {taken_first: [other.getsockname()[1]]}
        monkeypatch.setattr(sglang_server, "free_port", lambda host, among: taken.pop(host, [free_port(host, among)])[0])
        engine = small_server(make_tiny_model(tmp_path / "model"), 64)
    log = (tmp_path / "sglang.log").read_text()
    assert not taken and sglang_server.TAKEN.search(log), log[-3000:]
    engine.close()


@with_sglang
@pytest.mark.parametrize("victim", ["scheduler", "detokenizer"])
def test_the_death_of_a_process_breaks_every_request_at_once(tmp_path: Path, victim: str) -> None:
    engine = small_server(make_tiny_model(tmp_path / "model"), 4000)
    members = session_members(engine._server.process.pid)
    assert re.fullmatch("[0-9a-f]{48}", engine._server.key)  # SGLang takes a word that begins with a dash for an option

    async def all_of(name: str) -> list[object]:
        request = GenerateRequest(name, prompt(8), 2, SamplingParams(), Stop(), 3900)
        return [sample async for sample in engine.generate(request)]

    async def killed() -> tuple[list[object], float]:
        tasks = [asyncio.create_task(all_of(name)) for name in "ab"]
        while not engine.stats().decoded_tokens:
            await asyncio.sleep(0.01)
        os.kill(next(pid for pid in members if victim in command_of(pid)), signal.SIGKILL)
        started = time.monotonic()
        return await asyncio.gather(*tasks, return_exceptions=True), time.monotonic() - started

    errors, seconds = asyncio.run(killed())
    assert seconds < 5
    for error in errors:
        assert isinstance(error, RuntimeError) and re.search(rf"SGLang engine is dead: its {victim} \(pid \d+\)", str(error))
    with pytest.raises(RuntimeError, match=f"its {victim}"):
        asyncio.run(all_of("later"))
    engine.close()
    assert not [pid for pid in members if "sglang" in command_of(pid)]
    assert not list(Path("/dev/shm").glob(f"rlinf-test-{tmp_path.name}*"))


@with_sglang
def test_a_server_that_still_computes_is_waited_for_before_its_memory_is_taken(tmp_path: Path) -> None:
    """On a GPU a step is under way when the last token arrives; the engine knows of none that runs. Here it is a longer one."""
    engine = small_server(make_tiny_model(tmp_path / "model"), 4000)
    limits = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [prompt(8).tolist()], "sampling_params": [limits]}

    async def slept() -> tuple[bool, int]:
        answer = asyncio.create_task(engine._http.post("/generate", body))
        await asyncio.sleep(0.5)
        begun = not answer.done()
        await engine.sleep(frozenset({"kv"}))
        return begun, len((await answer)[0]["output_ids"])

    assert asyncio.run(slept()) == (True, 200) and not engine.dead
    engine.close()


@with_sglang
@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3-moe"])
def test_a_grpo_run_with_sglang(tmp_path: Path, family: str) -> None:
    config = write_run(
        tmp_path, family=family, algorithm__sampling_params__top_p=0.9, runner__profile_steps=[2], **BACKEND
    )  # four actor ranks, TP 2 x PP 2
    done = run(config, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = lines(tmp_path)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(math.isfinite(m["train/loss"]) for m in metrics[1:])
    # fp32: engine and actor are one policy, in what they sample and, after every sync, on the probes
    assert all(m["train/rollout_logprob_gap_max"] <= 1e-4 for m in metrics[1:])
    assert all(m["sync/probe_gap_max"] <= 1e-4 for m in metrics if "sync/probe_gap_max" in m) and "sync/probe_gap_max" in metrics[2]
    assert all(m["train/first_minibatch_clip_fraction"] == 0 for m in metrics[1:])
    assert all(m["rollout/reused_tokens"] > 0 and m["rollout/truncated_mass"] is None for m in metrics[1:])
    traces = sorted(p.name.partition(".")[0] for p in (tmp_path / "logs" / "tiny" / "profile").iterdir())
    assert traces == ["step_000002-actor-0", "step_000002-rollout-0-TP-0"]


@with_sglang
@pytest.mark.parametrize("victim, transport", [("scheduler", "broadcast"), ("worker", "auto")])
def test_a_killed_engine_ends_the_run_and_leaves_nothing(tmp_path: Path, victim: str, transport: str) -> None:
    running = Running(tmp_path, patience=400, rollout__weight_transport=transport, **BACKEND)
    scheduler = next(pid for pid in marked(running.run_id) if "sglang::scheduler" in command_of(pid))
    steps = lines(tmp_path)
    os.kill(scheduler if victim == "scheduler" else running.pid("rollout", 0), signal.SIGKILL)
    code, errors = running.end()
    assert code == 1
    assert all(m["train/rollout_logprob_gap_max"] <= 1e-4 for m in steps[1:]) and steps[2]["sync/probe_gap_max"] <= 1e-4
    if victim == "scheduler":
        who = r"(rollout|actor) rank 0"  # the publisher hears it too, when a broadcast is under way
        assert re.search(rf"rlinf: {who} .*failed in \w+ \(phase: step \d+, .*SGLang engine is dead: its scheduler \(pid", errors)
        assert str(running.logs / "rollout-0-engine.log") in errors
    else:
        assert re.search(r"rlinf: rollout rank 0 .*died \(phase: step \d+, ", errors)


@with_sglang
def test_an_evaluation_with_sglang_is_that_of_the_embedded_engine(tmp_path: Path) -> None:
    """Greedy and in fp32: the same responses, judged the same, with the same scores; a model that is right now and then."""
    model = write_tuned_model(tmp_path / "tuned")
    found = {}
    for backend in ("embedded", "sglang"):
        folder = tmp_path / backend
        folder.mkdir()
        write_data(folder / "set.jsonl", ("math", "exact"))
        custom = {"n": 1, "temperature": 0.0, "max_tokens": 12, "template": "chat", "instruction": "''"}
        assert main(["eval", *words(folder, model, **custom), f"rollout.rollout_backend={backend}"]) == 0
        found[backend] = samples(folder, "tuned"), results(folder, "tuned")["scores"]
        assert len([*folder.rglob("tuned/workers/rollout-0-engine.log")]) == (backend == "sglang")
    assert found["sglang"] == found["embedded"]
    rows, scores = found["sglang"]
    assert len(rows) == 16 and 0 < scores["avg@1"]["value"] and len({row["response"] for row in rows}) > 1
