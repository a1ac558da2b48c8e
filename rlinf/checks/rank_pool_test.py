"""A pool of ranks never hangs: a rank that fails or dies is an error at once, and the next run starts new ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlinf.checks.rank_pool import RankPool
from rlinf.cluster.processes import start_time
from rlinf.errors import RunFailed

ROOT = Path(__file__).resolve().parents[2]


def summed_rank(at: Any, value: float) -> tuple[int, np.ndarray]:
    import torch
    import torch.distributed as dist

    total = torch.full((2,), value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_world_size(), total.numpy()


def coordinates(at: Any) -> tuple[int, ...]:
    return at.tp_rank, at.tp, at.pp_rank, at.pp, at.dp_rank, at.dp, at.cp_rank, at.cp


def fails_in_rank_1(at: Any) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("planted in rank 1")
    dist.barrier()


def killed_in_rank_1(at: Any) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_layouts_change_within_one_pool(rank_pool: RankPool) -> None:
    for ranks in (4, 1, 3):
        for world, total in rank_pool.run(summed_rank, 1.0, ranks=ranks):
            assert world == ranks and total.tolist() == [ranks + sum(range(ranks))] * 2
    assert rank_pool.run(coordinates, ranks=4, tp=2, pp=2) == [
        (0, 2, 0, 2, 0, 1, 0, 1),
        (1, 2, 0, 2, 0, 1, 0, 1),
        (0, 2, 1, 2, 0, 1, 0, 1),
        (1, 2, 1, 2, 0, 1, 0, 1),
    ]
    assert rank_pool.run(coordinates, ranks=4, tp=2) == [
        (0, 2, 0, 1, 0, 2, 0, 1),
        (1, 2, 0, 1, 0, 2, 0, 1),
        (0, 2, 0, 1, 1, 2, 0, 1),
        (1, 2, 0, 1, 1, 2, 0, 1),
    ]
    assert rank_pool.run(coordinates, ranks=4, cp=2) == [
        (0, 1, 0, 1, 0, 2, 0, 2),
        (0, 1, 0, 1, 0, 2, 1, 2),
        (0, 1, 0, 1, 1, 2, 0, 2),
        (0, 1, 0, 1, 1, 2, 1, 2),
    ]


def parent_of(at: Any) -> int:
    return os.getppid()


def test_ranks_are_forked_from_one_process_that_has_the_imports(rank_pool: RankPool) -> None:
    (server,) = set(rank_pool.run(parent_of, ranks=4))
    assert server != os.getpid() and "libtorch" in Path(f"/proc/{server}/maps").read_text()
    assert len(os.listdir(f"/proc/{server}/task")) == 1  # a fork would lose the others
    with RankPool(1) as another:
        assert another.run(parent_of) == [server]


@pytest.mark.slow
def test_a_failing_or_dying_rank_is_an_error_at_once_and_the_pool_starts_again() -> None:
    with RankPool(2) as pool:
        pool.run(coordinates)
        started = time.monotonic()
        with pytest.raises(RunFailed, match=r"(?s)rank 1 ended with exit code 1.*fails_in_rank_1.*ValueError: planted in rank 1"):
            pool.run(fails_in_rank_1)
        assert time.monotonic() - started < 30
        pool.run(coordinates)
        started = time.monotonic()
        with pytest.raises(RunFailed, match="rank 1 ended with exit code -9"):
            pool.run(killed_in_rank_1)
        assert time.monotonic() - started < 30
        assert len(pool.run(coordinates)) == 2


@pytest.mark.slow
def test_ranks_die_with_their_parent() -> None:
    code = (
        "from rlinf.checks.rank_pool_test import RankPool, coordinates\n"
        "if __name__ == '__main__':\n"
        "    pool = RankPool(2); pool.run(coordinates); print(*(p.pid for p in pool._processes), flush=True)\n"
        "    import time; time.sleep(100)\n"
    )
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    ranks = [int(word) for word in script.stdout.readline().split()]
    assert len(ranks) == 2 and all(start_time(pid) is not None for pid in ranks)
    script.kill()
    script.wait()
    deadline = time.monotonic() + 20
    while any(start_time(pid) is not None for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in ranks if start_time(pid) is not None] == []
