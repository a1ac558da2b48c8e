"""The server's processes and their environment, with sleeping shells in the place of SGLang."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlinf.rollout.sglang_server import SGLangServer, command_of, kill, session_members

HELPER = "python3 -m torch._inductor.compile_worker --workers=32"
TREE = f'(exec -a "sglang::scheduler_TP0" sleep 60) & (exec -a "{HELPER}" sleep 60) & wait'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SGLangServer]:
    server = SGLangServer.__new__(SGLangServer)
    server.folder, server.log, server.death, server.on_death, server._closing = tmp_path / "own", tmp_path / "log", None, None, False
    server._watcher, server._shared = None, set()
    server.log.write_text("the last line\n")
    server.process = subprocess.Popen(["bash", "-c", TREE], start_new_session=True)
    yield server
    server.close()


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happened()


def member(server: SGLangServer, word: str) -> int:
    found = lambda: [pid for pid in session_members(server.process.pid) if command_of(pid).startswith(word)]
    assert within(10, lambda: bool(found()))
    return found()[0]


def test_helpers_end_and_the_engine_lives_a_scheduler_ends_and_it_is_dead(server: SGLangServer) -> None:
    """Inductor's compilers leave about a minute after their last kernel."""
    helper, scheduler = member(server, "python3 -m torch._inductor"), member(server, "sglang::")
    tree = server._tree()
    assert tree == {server.process.pid: "HTTP front", scheduler: "scheduler_TP0"}
    server._watch(tree)
    kill([helper])
    assert not within(0.3, lambda: server.death is not None) and scheduler in session_members(server.process.pid)
    kill([scheduler])
    assert within(10, lambda: server.death is not None)
    assert "its scheduler_TP0 (pid" in server.death and "the last line" in server.death


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_starts_on_gpus_of_which_an_actor_holds_unequal_parts(server: SGLangServer, device: str) -> None:
    env = server._environment({"device": device, "tp_size": 2})
    assert env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    assert ("SGLANG_USE_CPU_ENGINE" in env) == (device == "cpu")
