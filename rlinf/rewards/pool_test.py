"""The cage: nothing that a worker does or suffers reaches another item, the order, or the machine after us."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlinf.config.schema import RewardConfig
from rlinf.rewards.pool import Pool
from rlinf.rewards.verifier import Item, Verifier

ROOT = Path(__file__).parents[2]
SPIN = r"\int_0^1 \sin(\cos(\tan(x^{x^{x}}))) \ln(x^x+\sin x)\,dx"  # math-verify works on it until it is killed


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(num_processes=2) as v:
        yield v


def symbolic(i: int) -> Item:
    return Item(f"\\boxed{{\\sqrt{{{i * i * 3}}}}}", (f"\\boxed{{{i}\\sqrt{{3}}}}",))


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{p}").exists() for p in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(Path(f"/proc/{p}").exists() for p in pids)


def test_killed_workers_are_replaced_and_lose_nothing(verifier: Verifier) -> None:
    assert verifier.verify(*symbolic(2)[:2]).reward == 5.0
    for pid in verifier.worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert [v.status.value for v in verifier.verify_many([symbolic(i) for i in range(3, 9)])] == ["right"] * 6


def test_a_killed_nursery_is_replaced_and_loses_nothing(verifier: Verifier) -> None:
    assert verifier.verify(*symbolic(49)[:2]).reward == 5.0
    state, workers = verifier._pool_for("math")._state, verifier.worker_pids()
    nursery = state.nursery.process
    nursery.kill()
    nursery.wait()
    assert workers and gone(workers)
    assert [v.status.value for v in verifier.verify_many([symbolic(i) for i in range(50, 56)])] == ["right"] * 6
    assert state.nursery.process is not nursery


def test_a_nursery_may_have_more_descriptors_than_select_takes() -> None:
    """A thousand workers have as many; here the first that it listens to is behind them."""
    ours, theirs = socket.socketpair()
    script = """
import os, resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (1200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
others = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
from rlinf.rewards.cage import fork_workers
fork_workers(socket.socket(fileno=os.dup(0)))
"""
    with ours, theirs, subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stderr=subprocess.PIPE, cwd=ROOT) as nursery:
        theirs.close()
        ours.close()  # whoever asks has ended
        assert nursery.wait(20) == 0, nursery.stderr and nursery.stderr.read()


def test_a_worker_shares_what_the_nursery_has_loaded(verifier: Verifier) -> None:
    verifier.verify(*symbolic(59)[:2])
    nursery, old = verifier._pool_for("math")._state.nursery.process.pid, verifier.worker_pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    assert [v.status.value for v in verifier.verify_many([symbolic(i) for i in range(60, 66)])] == ["right"] * 6
    nanoseconds = [int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in (nursery, *set(verifier.worker_pids()) - {*old})]
    assert len(nanoseconds) > 1 and max(nanoseconds[1:]) < nanoseconds[0] / 3
    assert len(os.listdir(f"/proc/{nursery}/task")) == 1  # a fork would lose the others


def test_a_worker_killed_while_it_works_gets_its_item_done_by_another() -> None:
    with Verifier(num_processes=1, timeout=2.0) as v:
        v.verify(*symbolic(2)[:2])
        victims = v.worker_pids()

        def kill_the_busy_one() -> None:
            time.sleep(0.3)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=kill_the_busy_one)
        thread.start()
        verdicts = v.verify_many([Item("\\boxed{1}", (SPIN,)), *(symbolic(i) for i in range(20, 24))])
        thread.join()
        assert [x.status.value for x in verdicts[1:]] == ["right"] * 4
        assert verdicts[0].route in ("timeout", "math-verify", "unreadable", "limit")


def test_a_stuck_item_is_undecided_in_time_and_the_others_are_unaffected(verifier: Verifier) -> None:
    verifier.verify(*symbolic(2)[:2])
    stuck = Item(f"\\boxed{{{SPIN}}}", ("1",))
    items = [symbolic(31), stuck, *(symbolic(i) for i in range(32, 44))]
    verdicts = verifier.verify_many(items)
    assert verdicts[1].status.value == "undecided" and verdicts[1].seconds <= 2.5
    assert [v.status.value for v in verdicts[:1] + verdicts[2:]] == ["right"] * 13


def test_children_die_with_a_killed_parent() -> None:
    code = (
        "import time\nfrom rlinf.rewards.verifier import Verifier\nv = Verifier()\nv.verify('\\\\boxed{\\\\sqrt{12}}', ['2\\\\sqrt{3}'])\n"
        "print(v.worker_pids(), flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(p) for p in parent.stdout.readline().strip("[]\n").split(",")]
    parent.kill()
    parent.wait()
    assert pids and gone(pids)


def test_a_script_that_never_closes_leaves_nothing_behind() -> None:
    code = (
        "from rlinf.rewards.verifier import Verifier\nv = Verifier(num_processes=2)\n"
        "print(v.verify('\\\\boxed{\\\\sqrt{12}}', ['2\\\\sqrt{3}']).status.value, v.worker_pids())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    status, pids = done.stdout.split(" ", 1)
    assert status == "right" and gone([int(p) for p in pids.strip("[]\n").split(",")])


def test_close_reaps_every_child_and_ends_every_thread() -> None:
    before = set(threading.enumerate())
    v = Verifier(num_processes=2)
    v.verify(*symbolic(2)[:2])
    pids = v.worker_pids()
    v.close()
    assert pids and not any(Path(f"/proc/{p}").exists() for p in pids)
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("rlinf-keeper")]


def test_a_worker_is_clean_small_and_named(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLINF_RUN_ID", "run-of-this-test")
    with Verifier() as v:
        v.verify(*symbolic(2)[:2])
        pid = v.worker_pids()[0]
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps and "numpy" not in maps
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (1 << 30, 1 << 30)
        assert b"RLINF_RUN_ID=run-of-this-test" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_works_in_threads_and_keeps_the_order(verifier: Verifier) -> None:
    results: dict[int, list[str]] = {}

    def work(k: int) -> None:
        items = [symbolic(100 * k + i) if i % 2 else Item("\\boxed{\\sqrt{7}}", (str(100 * k + i),)) for i in range(20)]
        results[k] = [v.status.value for v in verifier.verify_many(items)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: ["wrong", "right"] * 10 for k in range(1, 4)}


def test_a_pool_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Pool(1, 1.0) as pool, pytest.raises(RuntimeError, match="did not start"):
        pool.submit(("math", "1", ("1",))).result(timeout=20)


# -- functions of the user's own

SLOW_FIRST = """
import os, sys, time
print("at import")
def lazy(answer, solutions):
    if not hasattr(sys, "warm"):
        time.sleep(1.5)
        sys.warm = True
    if answer == "hang":
        time.sleep(60)
    return True
def stuck(answer, solutions):
    time.sleep(60)
def chatty(answer, solutions):
    print("hello from", answer)
    os.system("echo and from a child")
    return True
def noisy(answer, solutions):
    while True:
        print("x" * 1000)
"""


def own(tmp_path: Path, name: str) -> dict[str, str]:
    (tmp_path / "fns.py").write_text(SLOW_FIRST)
    return {"odd": f"{tmp_path}/fns.py:{name}"}


def test_the_first_call_in_a_process_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlinf.rewards.pool.FIRST_SECONDS", 20.0)
    with Verifier(timeout=0.5, own_tasks=own(tmp_path, "lazy")) as v:
        found = [v.verify(f"\\boxed{{{word}}}", ["1"], "odd") for word in ("a", "hang", "b")]
    assert [f.status.value for f in found] == ["right", "undecided", "right"]
    assert found[1].route == "timeout" and "heavy imports belong at the top of the file" in found[1].reason


def test_a_function_that_always_hangs_has_the_longer_limit_only_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlinf.rewards.pool.FIRST_SECONDS", 1.0)
    with Verifier(timeout=0.1, own_tasks=own(tmp_path, "stuck")) as v:
        seconds = [v.verify(f"\\boxed{{{i}}}", ["1"], "odd").seconds for i in range(5)]
    assert min(seconds[:3]) >= 1.0 > max(seconds[3:])


def test_a_task_of_the_users_own_has_the_time_of_own_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlinf.rewards.pool.FIRST_SECONDS", 0.1)
    reward = RewardConfig(own_tasks=own(tmp_path, "lazy"), timeout=0.1)
    for own_timeout, route in ((None, "timeout"), (20.0, "own")):
        with Verifier.of(replace(reward, own_timeout=own_timeout), 1) as v:
            assert v.verify("\\boxed{a}", ["1"], "odd").route == route


def test_what_a_users_function_prints_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Verifier(timeout=5.0, own_tasks=own(tmp_path, "chatty")) as v:
        assert v.verify("\\boxed{me}", ["1"], "odd").status.value == "right"
    told = wait_for(capfd, "and from a child")
    assert "at import" in told and "hello from me" in told


def test_endless_printing_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rlinf.rewards.pool.PRINTED_BYTES", 5000)
    monkeypatch.setattr("rlinf.rewards.pool.FIRST_SECONDS", 1.0)
    with Verifier(timeout=0.5, own_tasks=own(tmp_path, "noisy")) as v:
        assert [v.verify(f"\\boxed{{{i}}}", ["1"], "odd").route for i in range(2)] == ["timeout"] * 2
    told = wait_for(capfd, "is dropped")
    assert len(told) < 5500 and told.count("has printed 5000 bytes") == 1


def wait_for(capfd: pytest.CaptureFixture[str], text: str) -> str:
    told, deadline = "", time.monotonic() + 10
    while text not in told and time.monotonic() < deadline:
        told += capfd.readouterr().err
        time.sleep(0.02)
    return told
