"""The SGLang server as a child process: which interpreter has SGLang, how the server is started, watched and ended.

The server is a tree of processes (HTTP front, one scheduler a GPU, detokenizer). The death of any of them is the death of the engine:
it is seen at once through pidfds, and the whole tree is killed, so that every open connection breaks instead of waiting forever. Helpers
of theirs (those that compile kernels, a resource tracker) come and go.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import logging
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rlinf.errors import RunFailed, UserError
from rlinf.hardware import EVERYWHERE, free_port, ports_of
from rlinf.rollout import sglang_launch
from rlinf.rollout.sglang_environment import server_environment
from rlinf.rollout.sglang_http import HOST

KEY = "rollout.sglang"
TITLE = "sglang::"  # how the names of the server's own processes begin, but for the front's
LOG_TAIL, LOG_WIDTH = 12, 400  # lines of the log in a message, and characters of each: SGLang's line of all its settings has thousands
LOADS = re.compile(r"/dev/shm/sglang_loads_\S+\.shm$", re.MULTILINE)
TAKEN = re.compile(r"address already in use|EADDRINUSE|port at \d+ is not available|Could not bind port", re.IGNORECASE)
REFUSAL = re.compile(r"error: (unrecognized arguments: .*|argument .*)|(Unsupported config option .*)")


def find_interpreter(named: str | None, cuda: bool) -> str:
    """The python that has SGLang: the named one, this one, or on CPU the one of toolkits/setup/sglang_cpu.sh. Raises UserError."""
    if named is not None:
        if not os.access(named, os.X_OK):
            raise UserError(f"rollout.sglang_python: {named} is not an executable file; give the path of a python that has sglang")
        return named
    if importlib.util.find_spec("sglang") is not None:
        return sys.executable
    folder = Path(os.environ.get("RLINF_CACHE", "~/.cache/rlinf")).expanduser() / "sglang-cpu"
    if not cuda and (folder / "rlinf-stamp").is_file():
        return str(folder / "bin" / "python")
    remedy = "install requirements/gpu.txt" if cuda else "run toolkits/setup/sglang_cpu.sh"
    raise UserError(
        f"rollout.rollout_backend is sglang, but sglang is not installed for {sys.executable}; {remedy}, name an interpreter that has it "
        "(rollout.sglang_python), or use rollout.rollout_backend: embedded"
    )


class SGLangServer:
    """Starts in the constructor and returns when requests are served. `info` is what the server says of itself.

    options: SGLang's own, in the spelling of its command line with underscores. native: those of them that the user wrote.
    on_death: called from another thread when the server has died by itself.
    serves: whether this is where requests go: not on the other nodes of an engine that spans several. `info` is empty there.
    Call from a thread that lives as long as the server should: the kernel ends the server with the thread that started it.
    """

    def __init__(
        self, python: str, options: dict[str, Any], native: dict[str, Any], log: Path, run_id: str, start_timeout: float,
        on_death: Callable[[], None] | None = None, serves: bool = True,
    ) -> None:  # fmt: skip
        self.key = secrets.token_hex(24)  # never begins with a dash, which SGLang would take for an option
        self.log = log
        self.death: str | None = None
        self.on_death = on_death
        self._closing = False
        self._watcher: threading.Thread | None = None
        self.folder = Path(f"/dev/shm/rlinf-{run_id}-sglang-{secrets.token_hex(4)}")  # ends with the run, like all its shared memory
        words = {**options, **native}
        env = server_environment(words, self.folder)
        self.folder.mkdir(mode=0o700)
        log.parent.mkdir(parents=True, exist_ok=True)
        launch = partial(self._launch, python, words, env)
        launch()
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._wait_until_ready("/ready" if serves else "/health", start_timeout, launch)
            self.info: dict[str, Any] = self._ask("/server_info") if serves else {}
            unknown = sorted(name for name in native if serves and name not in self.info)
            if unknown:  # argparse takes the beginning of a name for the name
                raise UserError(f"{KEY}.{unknown[0]}: sglang {self.info['version']} has no such option; write its full name")
            on_failure.pop_all()
        self._withdraw_names()
        self._watch(self._tree())

    def _launch(self, python: str, options: dict[str, Any], env: dict[str, str]) -> None:
        """Start the process, on ports that are free now."""
        own = ports_of(int(os.environ.get("LOCAL_RANK", "0")))
        self.port, nccl_port = free_port(HOST, own[::2]), free_port(EVERYWHERE, own[1::2])
        words = {"nccl_port": nccl_port, **options, "host": HOST, "port": self.port, "api_key": self.key}
        config = self.folder / "server.yaml"  # not the command line, which everybody can read: it holds the key
        config.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in words.items()}))
        command = [python, "-I", os.path.abspath(sglang_launch.__file__), str(os.getpid()), str(config)]
        with open(self.log, "a", opener=private) as output:
            self._begin = output.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
            )

    def close(self) -> None:
        """End the whole tree. May be called twice."""
        if self._closing:
            return
        self._closing = True
        self._kill()
        self.process.wait()
        deadline = time.monotonic() + 3.0
        while (trackers := session_members(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        kill(trackers)
        if self._watcher is not None:
            self._watcher.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def obituary(self) -> str:
        """Why calls fail. Waits for the watcher, which may hear of a death a moment after a connection has broken."""
        deadline = time.monotonic() + 2.0
        while self.death is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.death or f"the SGLang server (pid {self.process.pid}) closed a connection; its log: {self.log}"

    def _wait_until_ready(self, path: str, timeout: float, launch_again: Callable[[], None]) -> None:
        deadline, chances = time.monotonic() + timeout, 1
        while not self._answers(path):
            ended, said = self.process.poll() is not None, self._said()
            self._withdraw_names()
            if chances and TAKEN.search(said):  # between our look at its ports and its own, another program has taken one
                chances -= 1
                self._kill()  # it may still be about to warm up what will never listen
                self.process.wait()
                launch_again()
            elif ended:
                refused, tail = REFUSAL.search(said), self._tail(self.log)
                if refused:
                    raise UserError(f"{KEY}: SGLang refuses an option: {refused[1] or refused[2]}\nIts log: {self.log}")
                raise RunFailed(f"the SGLang server ended with code {self.process.returncode} while starting; its log: {self.log}\n{tail}")
            if time.monotonic() > deadline:
                raise RunFailed(f"the SGLang server was not ready within {timeout:g} s (cluster.start_timeout); its log: {self.log}")
            time.sleep(0.2)

    def _said(self) -> str:
        """What is in the log since the last start."""
        with open(self.log, "rb") as log:
            log.seek(self._begin)
            return log.read().decode(errors="replace")

    def _answers(self, path: str) -> bool:
        try:
            return self._ask(path, 5.0) is not None
        except (ConnectionError, TimeoutError, http.client.HTTPException):  # the last two: it is not the server that listens there
            return False

    def _ask(self, path: str, timeout: float = 60.0) -> Any:
        """A GET before the event loop turns; None unless the answer is good."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.key}"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        return json.loads(body or b"{}") if answer.status == 200 else None

    def _withdraw_names(self) -> None:
        """SGLang's schedulers tell its front their load in files of shared memory, which would outlive servers that are killed. Without a
        name they end with those that have them open; the front does without one that it has not opened yet."""
        for pid in session_members(self.process.pid):
            for path in LOADS.findall(mapped_by(pid)):
                Path(path).unlink(missing_ok=True)

    def _tree(self) -> dict[int, str]:
        """The server's own processes and their names."""
        names = {pid: command_of(pid).partition(" ")[0] for pid in session_members(self.process.pid)}
        tree = {pid: name.removeprefix(TITLE) for pid, name in names.items() if name.startswith(TITLE)}
        tree[self.process.pid] = "HTTP front"
        return tree

    def _watch(self, tree: dict[int, str]) -> None:
        poll = select.poll()
        names = {os.pidfd_open(pid): f"{name} (pid {pid})" for pid, name in tree.items()}
        for fd in names:
            poll.register(fd, select.POLLIN)

        def wait() -> None:
            ended = [names[fd] for fd, _ in poll.poll()]
            if not self._closing:
                self.death = f"the SGLang engine is dead: its {', '.join(ended)} ended; its log: {self.log}\n{self._tail(self.log)}"
            self._kill()
            for fd in names:
                os.close(fd)
            if self.death is not None and self.on_death is not None:
                logging.getLogger(__name__).error(self.death.partition("\n")[0])  # nobody may be left to tell it to
                self.on_death()

        self._watcher = threading.Thread(target=wait, name="sglang-watcher", daemon=True)
        self._watcher.start()

    def _kill(self) -> None:
        """Every process of the server's session; its resource tracker ends by itself when they are gone, after it has cleaned up."""
        while alive := [pid for pid in session_members(self.process.pid) if not is_tracker(pid)]:
            kill(alive)
            time.sleep(0.01)

    @staticmethod
    def _tail(log: Path) -> str:
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return "\n".join(f"  | {line[:LOG_WIDTH]}{'...' * (len(line) > LOG_WIDTH)}" for line in lines)


def private(path: str, flags: int) -> int:
    """Opens a log that its owner alone can read, like the key: SGLang writes down all its settings."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)  # one of an earlier start
    return descriptor


def mapped_by(pid: int) -> str:
    """What it has mapped; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def session_members(leader: int) -> list[int]:
    """The living processes of the session that `leader` began."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def command_of(pid: int) -> str:
    """Its command line; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_tracker(pid: int) -> bool:
    """multiprocessing's process that removes what others leave behind."""
    return "resource_tracker" in command_of(pid)
