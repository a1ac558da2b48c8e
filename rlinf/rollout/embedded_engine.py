"""The embedded rollout engine: implements the asynchronous contract of rollout engines with a Batcher that runs on a thread of its own.

Everything that touches the model runs on that one thread, one call at a time; the event loop only passes requests in and samples out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import profile

from rlinf.compute_thread import compute_thread
from rlinf.data.records import Sample
from rlinf.device import give_back_free_memory, recorder, synchronize
from rlinf.errors import RunFailed, UserError
from rlinf.rollout.batcher import Batcher, Outcome
from rlinf.rollout.contract import Capabilities, EngineStats, GenerateRequest
from rlinf.rollout.embedded_model import EmbeddedModel
from rlinf.rollout.limits import architecture_for, check_request
from rlinf.rollout.running_sample import Decode, Job
from rlinf.weights.dtypes import DTYPES
from rlinf.weights.opening import open_source
from rlinf.weights.segments import Mappings
from rlinf.weights.source import Disk, Receipt, SharedMemory, WeightSource

TURN_SECONDS = 0.02  # how long the engine thread works before it looks for new requests


class EmbeddedEngine:
    """One model on one device. It is seeded: the noise of a token depends only on (seed, sample id, index of the token in the response).

    A Sample holds the tokens decoded for its request (not those of its prefix), each with the version of the weights that decoded it.
    load_weights() may be called while requests run: their samples go on with the new weights, with all keys and values computed anew.
    dtype: fp32, bf16 or fp16. slots: samples decoded at once. max_context: prompt + response tokens of a sample.
    """

    dead = False  # it has no other process that could die

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str,
        slots: int,
        max_context: int,
        seed: int,
        device: str = "cpu",
        decode: Decode | None = None,
        load_weights: bool = True,
    ) -> None:
        arch = architecture_for(model_dir, max_context)
        self.capabilities = Capabilities(seeded=True, sleep=True, max_context=max_context)
        self._decode = decode
        self._vocab = arch.vocab
        self._thread = compute_thread("embedded-engine")

        def build() -> Batcher:
            return Batcher(EmbeddedModel(arch, DTYPES[dtype], torch.device(device), max_context), slots, max_context, seed, decode)

        self._batcher = self._thread.submit(build).result()
        self._mappings = Mappings()
        self._inbox: deque[Job] = deque()  # submitted, not yet seen by the engine thread
        self._abandoned: deque[Job] = deque()
        self._outboxes: dict[Job, asyncio.Queue[Sample | BaseException]] = {}
        self._trace: tuple[profile, Path] | None = None
        self._driver: asyncio.Task[None] | None = None
        self._broken: BaseException | None = None
        self._asleep: frozenset[str] = frozenset() if load_weights else frozenset({"weights"})
        if load_weights:
            self._thread.submit(self._load, Disk(model_dir), 0).result()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Sample]:
        """Yield the n samples as they finish. Raises ValueError for a request that cannot run, RuntimeError when the engine is broken."""
        self._check_awake()
        check_request(request, self.capabilities.max_context, self._vocab)
        if request.stop.strings and self._decode is None:
            raise ValueError(f"request {request.request_id}: stop strings need an engine with a tokenizer")
        job = Job(request, request.n)
        outbox: asyncio.Queue[Sample | BaseException] = asyncio.Queue()
        self._outboxes[job] = outbox
        self._inbox.append(job)
        self._drive()
        try:
            for _ in range(request.n):
                item = await outbox.get()
                if isinstance(item, BaseException):
                    raise RuntimeError(f"the rollout engine failed: {item}") from item
                yield item
        finally:
            del self._outboxes[job]
            if job.unfinished:  # the caller closed the iterator before its end
                self._abandoned.append(job)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all): their iterators yield what was decoded."""
        chosen = None if request_ids is None else frozenset(request_ids)
        self._deliver(await self._call(self._abort, lambda job: chosen is None or job.request.request_id in chosen))

    async def load_weights(self, source: WeightSource, version: int) -> Receipt:
        """Load the weights in place and flush every cache. Raises RunFailed, and keeps the old weights, when a tensor or bucket is bad."""
        receipt = await self._call(self._load, source, version)
        self._asleep -= {"weights"}
        return receipt

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token given those before it, at temperature 1: for a sequence of n tokens an array [n-1] float32."""
        self._check_awake()
        return await self._call(self._batcher.sequence_logprobs, sequences)

    async def sleep(self, tags: frozenset[str]) -> None:
        """Free memory: the KV cache, the weights (until the next load_weights). Raises RuntimeError while requests run."""
        if self._outboxes:
            raise RuntimeError(f"cannot sleep with {len(self._outboxes)} requests running; abort them first")
        if "kv" in tags:
            await self._call(self._batcher.free_cache)
        if "weights" in tags:
            await self._call(self._batcher.model.free)
            self._mappings = Mappings()  # mapped segments count as memory of this process
        await self._call(give_back_free_memory, self._batcher.model.device)  # otherwise torch keeps it for this process
        self._asleep |= tags

    async def wake(self, tags: frozenset[str]) -> None:
        """Be ready to be used again; weights only with the next load_weights."""
        self._asleep -= tags - {"weights"}

    def stats(self) -> EngineStats:
        return self._batcher.counters.since_last()

    async def start_trace(self, folder: Path, name: str) -> None:
        await self._call(self._start_trace, folder / f"{name}.json.gz")

    async def stop_trace(self) -> None:
        await self._call(self._stop_trace)

    def close(self) -> None:
        """End the engine thread; pending iterators raise RuntimeError."""
        self._fail(self._broken or RuntimeError("the engine was closed"))
        self._thread.shutdown(wait=True)

    def _drive(self) -> None:
        """Make sure that a task in the running event loop keeps giving work to the engine thread."""
        loop = asyncio.get_running_loop()
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not loop:
            self._driver = loop.create_task(self._run())
            self._driver.add_done_callback(self._driver_ended)

    async def _run(self) -> None:
        while self._inbox or self._batcher.busy:
            self._deliver(await self._call(self._work))

    def _driver_ended(self, driver: asyncio.Task[None]) -> None:
        if not driver.cancelled() and (error := driver.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Mark the engine as broken, and raise the error in every pending iterator."""
        self._broken = error
        for outbox in self._outboxes.values():
            outbox.put_nowait(error)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for job, sample in outcomes:
            if job in self._outboxes:
                self._outboxes[job].put_nowait(sample)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._broken is not None:
            raise RuntimeError(f"the rollout engine failed: {self._broken}") from self._broken
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _work(self) -> list[Outcome]:
        """On the engine thread: take in requests, then make steps until samples end, TURN_SECONDS are over, or new requests wait."""
        self._take_in()
        outcomes: list[Outcome] = []
        deadline = time.perf_counter() + TURN_SECONDS
        while self._batcher.busy and not outcomes:
            outcomes = self._batcher.step()
            if self._inbox or time.perf_counter() > deadline:
                break
        return outcomes

    def _take_in(self) -> None:
        while self._inbox:
            self._batcher.submit(self._inbox.popleft())
        while self._abandoned:
            job = self._abandoned.popleft()
            self._batcher.abort(partial(is_, job))

    def _abort(self, chosen: Callable[[Job], bool]) -> list[Outcome]:
        self._take_in()
        return self._batcher.abort(chosen)

    def _load(self, source: WeightSource, version: int) -> Receipt:
        start = time.perf_counter()
        try:
            keep = isinstance(source, SharedMemory)  # its publisher does not overwrite a segment that an engine still maps
            n_tensors, nbytes = self._batcher.load(open_source(source, self._mappings), version, keep)
            synchronize(self._batcher.model.device)  # the source may be overwritten as soon as this returns
        except ValueError as error:
            if isinstance(source, Disk):
                raise UserError(f"{source.path}: {error}; the weights do not fit its config.json") from error
            raise RunFailed(f"weights of version {version} were refused: {error}") from error
        checksums = {} if isinstance(source, Disk) else {b.key: b.checksum for b in source.buckets}  # verified by open_source
        return Receipt(version, checksums, n_tensors, nbytes, time.perf_counter() - start)

    def _start_trace(self, file: Path) -> None:
        """On the engine thread: the profiler records the thread that starts it."""
        self._trace = recorder(), file
        self._trace[0].start()

    def _stop_trace(self) -> None:
        if self._trace is not None:
            (recorded, file), self._trace = self._trace, None
            recorded.stop()
            file.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(file))

    def _check_awake(self) -> None:
        if self._asleep:
            raise RuntimeError(f"the rollout engine is asleep ({', '.join(sorted(self._asleep))}); wake it, or load weights first")
