"""Where the head of a Ray cluster is: the files beside start_ray.sh that it writes, and how the other nodes find it.

Those files may be of an earlier cluster, and something else may listen at the address by now. So a node joins only a head that takes the
token which the node was given; every head makes a token of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlinf.cluster.state import (
    bracketed,
    default_port,
    environment_with,
    join_address,
    listens,
    port_number,
    silence,
    split_address,
    token_variables,
    whole_number,
)
from rlinf.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESS_FILE, TOKEN_FILE = "ray_head_ip.txt", "ray_token"
PROBE_LIMIT = 30.0  # seconds, of which a busy machine needs many to import Ray; what is not Ray would keep it for 40


@dataclass(frozen=True)
class Head:
    """Where the head is. In the shared file: the address alone on the first line, then `name=value` lines."""

    host: str
    port: int
    cluster: str = ""
    started: float = 0.0

    @staticmethod
    def parse(text: str, source: str) -> Head:
        """The head of an address file. Raises UserError that names `source`, the file, when it is none."""
        usual = default_port()
        try:
            first, *rest = text.split()
            values = dict(line.split("=", 1) for line in rest)
            host, port = split_address(first, source, usual)
            if "port" in values:
                port = port_number(values["port"], source)
            return Head(host, port, values.get("cluster", ""), float(values.get("started", 0)))
        except (ValueError, UserError) as error:
            begin = text.strip()[:40]
            raise UserError(
                f"{source} is not an address file, it begins with {begin!r}: delete it; the head writes its own (start_ray.sh with RANK=0)"
            ) from error

    def render(self) -> str:
        return f"{bracketed(self.host)}\nport={self.port}\ncluster={self.cluster}\nstarted={self.started:.3f}\n"

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


def start_timeout() -> int:
    """RLINF_START_TIMEOUT in seconds."""
    given = whole_number("RLINF_START_TIMEOUT", "seconds, such as 600")
    return 600 if given is None else given


def find_head(shared: Path, state: Path, head_address: str | None) -> Head:
    """The head, once it answers and takes the token, which is then in the state folder. Raises UserError that says at the time-out what was
    seen instead."""
    timeout = start_timeout()
    given = head_address or os.environ.get("HEAD_ADDRESS")
    deadline, seen, told = time.monotonic() + timeout, "", 0.0
    while time.monotonic() < deadline:
        head, seen = look_for_head(shared, state, given)
        if head:
            return head
        if time.monotonic() - told > 30:
            say(f"waiting for the head: {seen}")
            told = time.monotonic()
        time.sleep(1.0)
    raise UserError(f"no head node within RLINF_START_TIMEOUT = {timeout} s: {seen}. Run start_ray.sh with RANK=0 on the head node")


def look_for_head(shared: Path, state: Path, given: str | None) -> tuple[Head | None, str]:
    """(the head, or None; what was seen instead). Raises UserError when `given`, an address[:port], is no address."""
    file, wanted = shared / ADDRESS_FILE, os.environ.get("RLINF_CLUSTER_ID")
    if given:
        head, source = Head(*split_address(given, "HEAD_ADDRESS", default_port())), "HEAD_ADDRESS"
    elif (text := text_of(file)).strip():
        try:
            head, source = Head.parse(text, str(file)), str(file)
        except UserError as error:  # a head that is about to start replaces the file
            return None, str(error)
        if wanted and head.cluster != wanted:
            return None, f"{file} is of cluster {head.cluster or '(no id)'}, not of {wanted}"
    else:
        return None, f"there is no {file}"
    if why := silence(head.address):
        return None, f"{why}, from {source}"
    if not (token := text_of(shared / TOKEN_FILE)):
        return None, f"there is no {shared / TOKEN_FILE}; copy it from the head node"
    write_private(state / "token", token)
    if why := strangeness(head.address, state / "token"):
        return None, f"{why}; the address is from {source}, the token from {shared / TOKEN_FILE}"
    return head, ""


def strangeness(address: str, token: Path) -> str | None:
    """What is wrong with what listens at an address; None when it is a head of start_ray.sh that takes this token. A process of its own
    asks, since Ray reads its environment when it is imported, and may wait for long."""
    command = [sys.executable, "-m", "rlinf.cluster.head_probe", address]
    pipe = subprocess.PIPE
    try:
        done = subprocess.run(
            command, env=environment_with(token_variables(token)), cwd=ROOT, stdout=pipe, stderr=pipe, text=True, timeout=PROBE_LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"what listens at {address} does not answer like Ray"
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout.strip() or None


def publish(shared: Path, head: Head) -> None:
    """For as long as the head lives, write the address file again whenever somebody has removed it; stop when a newer head has written its
    own."""
    missed = 0
    while missed < 10:
        missed = 0 if listens(head.address) else missed + 1
        file = shared / ADDRESS_FILE
        text = text_of(file)
        if started_in(text, file) > head.started:
            return
        if text != head.render():
            write_atomically(file, head.render())
        time.sleep(1.0)


def started_in(text: str, file: Path) -> float:
    """When the head of an address file was started, in seconds since 1970; 0 when the file is empty or no address file."""
    with suppress(UserError):
        return Head.parse(text, str(file)).started
    return 0.0


def warn_of_another(shared: Path, head: Head) -> None:
    """Say so when the address file is of another cluster that still answers: without an id nobody can tell which of the two is meant."""
    file = shared / ADDRESS_FILE
    with suppress(UserError):
        other = Head.parse(text_of(file), str(file))
        if other.address != head.address and listens(other.address):
            say(
                f"{file} was of another cluster, at {other.address}, which still answers; nodes that were started before this head may "
                "be in that one. End it (start_ray.sh --stop on its nodes), or export one new RLINF_CLUSTER_ID on all nodes of this one"
            )


def withdraw(shared: Path, address: str, token: str) -> None:
    """Remove the address file and the token, each unless it is another cluster's by now."""
    file = shared / ADDRESS_FILE
    with suppress(UserError):
        if Head.parse(text_of(file), str(file)).address == address:
            file.unlink(missing_ok=True)
    if text_of(shared / TOKEN_FILE) == token:
        (shared / TOKEN_FILE).unlink(missing_ok=True)


def text_of(file: Path) -> str:
    """Empty when it is not there; another node may remove it at any moment."""
    with suppress(FileNotFoundError):
        return file.read_text(errors="replace")
    return ""


def write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.rename(path)


def say(line: str) -> None:
    sys.stderr.write(f"start_ray: {line}\n")
