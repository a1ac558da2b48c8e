"""Small workers that the tests of the cluster put into processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from rlinf.errors import UserError
from rlinf.scheduling.placement import WorkerAddress


class Plain:
    """Sync methods, one thread."""

    def __init__(self, address: WorkerAddress, *args: Any) -> None:
        self.address = address
        self.args = args
        self.torch_at_start = "torch" in sys.modules

    def describe(self) -> dict[str, Any]:
        with open(f"/proc/{os.getpid()}/environ", "rb") as file:
            at_start = dict(entry.split("=", 1) for entry in file.read().decode().split("\0") if "=" in entry)
        return {
            "address": self.address,
            "args": self.args,
            "env": dict(os.environ),
            "at_start": at_start,
            "pid": os.getpid(),
            "torch": self.torch_at_start,
            "cwd": os.getcwd(),
        }

    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self, rank: int = -1) -> int:
        if rank in (-1, self.address.rank):
            raise ZeroDivisionError("as asked")
        time.sleep(60)
        return 0

    def refuse(self) -> None:
        raise UserError("data.train_data_paths[0]: no such file: x.jsonl")

    def sum_of(self, *payloads: np.ndarray) -> int:
        return sum(int(p.sum()) for p in payloads)

    def mixed(self, *args: int | np.ndarray) -> tuple[int, ...]:
        """Numbers as they came, payloads as their sums, in the order of the arguments."""
        return tuple(int(np.sum(a)) for a in args)

    def say(self, text: str) -> None:
        print(text)
        os.system(f"echo child of {text}")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def spawn(self) -> int:
        """A stubborn grandchild."""
        return subprocess.Popen([sys.executable, "-S", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]).pid

    def close(self) -> None:
        print("closed politely")


class Broken(Plain):
    def __init__(self, address: WorkerAddress, rank: int) -> None:
        super().__init__(address)
        if address.rank == rank:
            raise ValueError("no model here")
        time.sleep(60)


class Collective(Plain):
    """A gloo group over all ranks."""

    def __init__(self, address: WorkerAddress) -> None:
        super().__init__(address)
        import torch
        import torch.distributed

        self.torch = torch
        torch.distributed.init_process_group("gloo")

    def total(self) -> tuple[float, int]:
        tensor = self.torch.full((4,), float(self.address.rank))
        self.torch.distributed.all_reduce(tensor)
        return float(tensor[0]), self.torch.get_num_threads()

    def total_without(self, rank: int, fail: bool) -> float:
        """An all-reduce that `rank` never enters: it raises or it sleeps."""
        if self.address.rank == rank:
            if fail:
                raise ZeroDivisionError("left the others alone")
            time.sleep(60)
        return self.total()[0]


class Async:
    """Async methods, one event loop, many calls at once."""

    def __init__(self, address: WorkerAddress) -> None:
        self.address = address
        self.running = 0
        self.most = 0

    async def generate(self, size: int) -> tuple[dict[str, int], np.ndarray]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.05)
        self.running -= 1
        return {"size": size, "pid": os.getpid()}, np.ones(size, dtype=np.int64)

    async def most_at_once(self) -> int:
        return self.most

    async def forever(self) -> None:
        await asyncio.Event().wait()

    async def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
