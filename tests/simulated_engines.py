"""Engines and verifier of a simulation: they take the time that answers of given lengths take, and nothing else."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlinf.data.records import Finish, GroupHeader, Status, Verdict, sample_id
from rlinf.rollout.contract import EngineStats

MEDIAN, SPREAD, LONGEST = 100.0, 1.25, 3000  # tokens: log-normal, and where it is cut off


def length_of(seed: int, sample: str) -> int:
    """Long-tailed: the longest of a few hundred samples is more than 20 times the median."""
    rng = np.random.default_rng([seed, *sample.encode()])
    return int(min(LONGEST, max(1.0, rng.lognormal(np.log(MEDIAN), SPREAD))))


class Engines:
    """The rollout group: `size` engines with `slots` each; a token takes a second. version: of the weights that they hold."""

    def __init__(self, size: int, slots: int, seed: int) -> None:
        self.size, self.seed, self.version, self.lives = size, seed, 0, [0] * size
        self.slots = [asyncio.Semaphore(slots) for _ in range(size)]
        self.stopped = [asyncio.Event() for _ in range(size)]
        self.lengths: list[int] = []
        self.tokens = self.aborts = 0
        self.decoded = [0] * size  # since the engine was asked for its stats

    def ref(self, rank: int, method: str, *args: Any, returns: int = 1) -> Any:
        if method == "abort":
            return asyncio.ensure_future(self.abort(rank))
        if method == "stats":
            return asyncio.ensure_future(self.stats(rank))
        assert (method, returns) == ("generate", 2)
        request, prompt, *before = args
        versions = [Counter(v) for v in before[0].versions] if before else [Counter() for _ in range(request.n)]
        payload = SimpleNamespace(name=request.request_id, prompt_id=prompt.prompt_id, versions=versions)
        return asyncio.ensure_future(self.generate(rank, request, payload)), payload

    async def generate(self, rank: int, request: Any, payload: Any) -> GroupHeader:
        stopped = self.stopped[rank]
        finishes = await asyncio.gather(*(self.sample(rank, request.request_id, k, payload.versions[k], stopped) for k in range(request.n)))
        header = header_of(payload, tuple(finishes), (None,) * request.n)
        if Finish.ABORT not in finishes:
            self.lengths += header.response_lengths
        return header

    async def sample(self, rank: int, name: str, k: int, versions: Counter[int], stopped: asyncio.Event) -> Finish:
        """Forty tokens at a time, under whatever weights are there."""
        wanted = length_of(self.seed, f"{name}/{k}")
        async with self.slots[rank]:
            while (left := wanted - sum(versions.values())) and not stopped.is_set():
                await asyncio.sleep(min(40, left))
                versions[self.version] += min(40, left)
                self.tokens += min(40, left)
                self.decoded[rank] += min(40, left)
        return Finish.STOP if left == 0 else Finish.ABORT

    async def stats(self, rank: int) -> EngineStats:
        counted, self.decoded[rank] = self.decoded[rank], 0
        return EngineStats(decoded_tokens=counted)

    async def results(self, asked: list[asyncio.Future[Any]]) -> list[Any]:
        return await asyncio.gather(*asked)

    async def abort(self, rank: int) -> None:
        self.aborts += 1
        self.stopped[rank].set()
        self.stopped[rank] = asyncio.Event()


class Judges:
    """The reward group. right: the share of right answers, by the hash of the sample's name."""

    def __init__(self, right: float = 0.5) -> None:
        self.size, self.right = 1, right
        self.files: dict[str, tuple[Any, Any]] = {}  # path -> (payload, verdicts)
        self.written: list[tuple[str, str]] = []  # (samples file, group), a line of the record

    async def call(self, rank: int, method: str, *args: Any) -> Any:
        if method == "keep":
            path, payload, verdicts = args
            self.files[path] = payload, verdicts
            return None
        assert method == "judge"
        await asyncio.sleep(1)
        payload, dump = args
        self.written.append((dump, payload.name))
        chance = np.random.default_rng([len(payload.versions), *payload.name.encode()])
        return tuple(verdict(chance.random() < self.right) for _ in payload.versions)

    def ref(self, rank: int, method: str, path: str, dump: str | None, returns: int) -> Any:
        assert (method, returns) == ("fetch", 2)
        payload, verdicts = self.files[path]
        if dump is not None:
            self.written.append((dump, payload.name))
        n = len(payload.versions)
        header: asyncio.Future[GroupHeader] = asyncio.get_running_loop().create_future()
        header.set_result(header_of(payload, (Finish.STOP,) * n, tuple(verdicts) or (None,) * n))
        return header, payload


def header_of(payload: Any, finishes: tuple[Finish, ...], verdicts: tuple[Verdict | None, ...]) -> GroupHeader:
    lengths, names = tuple(sum(v.values()) for v in payload.versions), tuple(sample_id(payload.name, k) for k in range(len(finishes)))
    versions = tuple(tuple(sorted(v.items())) for v in payload.versions)
    return GroupHeader(payload.name, payload.prompt_id, "math", 1, names, lengths, lengths, finishes, versions, verdicts)


def verdict(right: bool) -> Verdict:
    return Verdict(1.0 if right else -1.0, Status.RIGHT if right else Status.WRONG, "1", "exact", 0.0)
