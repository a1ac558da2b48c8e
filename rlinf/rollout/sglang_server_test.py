"""The server's processes and their environment, with sleeping shells in the place of SGLang."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlinf.errors import RunFailed, UserError
from rlinf.hardware import ports_of
from rlinf.rollout import sglang_server
from rlinf.rollout.sglang_server import SGLangServer, command_of, kill, session_members

HELPER = "python3 -m torch._inductor.compile_worker --workers=32"
TREE = f'(exec -a "sglang::scheduler_TP0" sleep 60) & (exec -a "{HELPER}" sleep 60) & wait'

FRONT = """#!{python}
import http.server, mmap, pathlib, sys, time, yaml
settings = pathlib.Path(sys.argv[-1])
words = yaml.safe_load(settings.read_text())
print(words, "x" * 9000, flush=True)
with open({loads!r}, "wb+") as file:
    file.truncate(4096)
    load = mmap.mmap(file.fileno(), 4096)
with open({starts!r}, "a") as file:
    file.write(f"{{words['port']}} {{words['nccl-port']}}\\n")
if len(open({starts!r}).readlines()) <= {failures}:
    time.sleep(1)
    sys.exit({last_words!r})

class Front(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{{}}")

http.server.HTTPServer(("127.0.0.1", words["port"]), Front).serve_forever()
"""
UVICORN = "ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', 24001): address already in use"
STORE = "DistNetworkError: The server socket has failed to listen on any local network address. port: 24003, code: -98, name: EADDRINUSE"
SGLANG = "ValueError: nccl_port at 24003 is not available"


def start(folder: Path, failures: int, last_words: str) -> tuple[SGLangServer | None, str, list[list[int]]]:
    """A server whose first starts fail with these words, or None and the error's; and its ports in each start."""
    python, starts = folder / "python", folder / "starts"
    loads = f"/dev/shm/sglang_loads_{folder.name}.shm"  # as a scheduler makes
    python.write_text(FRONT.format(python=sys.executable, starts=str(starts), failures=failures, last_words=last_words, loads=loads))
    python.chmod(0o700)
    server, error = None, ""
    try:
        server = SGLangServer(str(python), {"device": "cpu", "tp_size": 1}, {}, folder / "log", folder.name, 30.0)
    except RunFailed as failed:
        error = str(failed)
    assert not Path(loads).exists()
    return server, error, [[int(port) for port in line.split()] for line in starts.read_text().splitlines()]


@pytest.mark.parametrize("last_words", [UVICORN, STORE, SGLANG], ids=["front", "store", "nccl"])
def test_a_server_whose_port_was_taken_meanwhile_starts_once_more_on_others(
    last_words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    server, _, ports = start(tmp_path, 1, last_words)
    assert server is not None and len(ports) == 2 and server.port == ports[1][0]
    assert all({*pair} <= {*ports_of(3)} for pair in ports) and all(port != nccl_port for port, nccl_port in ports)
    server.close()
    assert last_words in server.log.read_text()


def test_the_key_is_read_by_nobody_else(tmp_path: Path) -> None:
    """SGLang writes all its settings to its log."""
    (tmp_path / "log").write_text("of an earlier start\n")
    (tmp_path / "log").chmod(0o644)
    server, _, _ = start(tmp_path, 0, "")
    for file, closed in ((server.log, server.log), (server.folder / "server.yaml", server.folder)):
        assert server.key in file.read_text() and closed.stat().st_mode & 0o77 == 0
    server.close()


@pytest.mark.parametrize(("failures", "last_words", "starts"), [(2, UVICORN, 2), (1, "ValueError: no such model", 1)])
def test_a_server_that_does_not_start_is_not_started_for_ever(tmp_path: Path, failures: int, last_words: str, starts: int) -> None:
    server, error, ports = start(tmp_path, failures, last_words)
    assert server is None and len(ports) == starts
    assert error.startswith("the SGLang server ended with code 1 while starting") and last_words in error
    assert max(map(len, error.splitlines())) < 500  # its settings are one line of many thousand characters
    assert not list(Path("/dev/shm").glob(f"rlinf-{tmp_path.name}*"))


def test_the_environment_is_made_for_what_the_user_wrote_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_for(options: dict[str, Any], _: Path) -> dict[str, str]:
        raise UserError(str(options))

    monkeypatch.setattr(sglang_server, "server_environment", made_for)
    with pytest.raises(UserError, match="'device': 'cuda', 'enable_memory_saver': True"):
        SGLangServer(sys.executable, {"device": "cuda"}, {"enable_memory_saver": True}, tmp_path / "log", tmp_path.name, 30.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SGLangServer]:
    server = SGLangServer.__new__(SGLangServer)
    server.folder, server.log, server.death, server.on_death, server._closing = tmp_path / "own", tmp_path / "log", None, None, False
    server._watcher = None
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


def test_helpers_end_and_the_engine_lives_a_scheduler_ends_and_it_is_dead(server: SGLangServer, caplog: pytest.LogCaptureFixture) -> None:
    """Inductor's compilers leave about a minute after their last kernel."""
    helper, scheduler = member(server, "python3 -m torch._inductor"), member(server, "sglang::")
    tree = server._tree()
    assert tree == {server.process.pid: "HTTP front", scheduler: "scheduler_TP0"}
    told: list[str] = []
    server.on_death = lambda: told.extend(caplog.messages)  # by then it is in the worker's log, which the driver quotes
    server._watch(tree)
    kill([helper])
    assert not within(0.3, lambda: server.death is not None) and scheduler in session_members(server.process.pid)
    kill([scheduler])
    assert within(10, lambda: bool(told))
    (line,) = told
    assert re.fullmatch(rf"the SGLang engine is dead: its scheduler_TP0 \(pid {scheduler}\).* ended; its log: {server.log}", line)
    assert "its scheduler_TP0 (pid" in server.death and "the last line" in server.death
