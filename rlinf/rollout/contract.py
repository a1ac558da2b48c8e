"""The contract of a rollout engine: its requests, its results, and what must hold for them.

Both engines (SGLang and the embedded one) pass the same contract tests (tests/test_engine_contract.py). Log-probabilities are of
softmax(logits / temperature), before top-p / top-k; the probability mass that these cut off is counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Protocol, runtime_checkable

import numpy as np

from rlinf.data.records import Sample, sample_id
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.source import Collective, Receipt, WeightSource


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 means greedy decoding, with log-probabilities at temperature 1. top_k <= 0 and top_p = 1 mean off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}")


@dataclass(frozen=True)
class Stop:
    """A sample ends after a token of token_ids, or after the token that completes one of the strings in its decoded text."""

    token_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


Decode = Callable[[list[int]], str]


def completes_string(stop: Stop, context: list[int], begin: int, decode: Decode) -> bool:
    """Whether one of stop.strings is in the text at the end of the response context[begin:].

    Only the last tokens are decoded. A character takes at most 4 tokens (one for each byte); a margin of 8 keeps the left edge of the tail,
    where a character may be incomplete, out of the comparison.
    """
    tail = 4 * max(map(len, stop.strings), default=0) + 8
    text = decode(context[max(begin, len(context) - tail) :]) if stop.strings else ""
    return any(s in text for s in stop.strings)


@dataclass(frozen=True)
class GenerateRequest:
    """n samples of one prompt. prompt_ids [P] int32.

    request_id names the request; sample k of it has the id `f"{request_id}/{k}"`. On a seeded engine the sampling noise of a token depends
    only on (engine seed, sample id, position), not on batching, order or other requests.
    prefixes: to continue samples, one array for each of the n samples with the tokens generated so far (may be empty). The resulting Sample
    holds only the tokens that follow; max_new_tokens counts the tokens of the prefix too.
    indices: the numbers k of the samples, when they are not 0..n-1.
    """

    request_id: str
    prompt_ids: np.ndarray
    n: int
    sampling: SamplingParams
    stop: Stop
    max_new_tokens: int
    prefixes: tuple[np.ndarray, ...] = ()
    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"request {self.request_id}: n and max_new_tokens must be >= 1, got {self.n} and {self.max_new_tokens}")
        if self.prefixes and len(self.prefixes) != self.n:
            raise ValueError(f"request {self.request_id}: {len(self.prefixes)} prefixes for n={self.n}")
        if self.indices and len(set(self.indices)) != self.n:
            raise ValueError(f"request {self.request_id}: indices {self.indices} for n={self.n}")
        if max(self.prefix_lengths) >= self.max_new_tokens:
            raise ValueError(f"request {self.request_id}: a prefix leaves no room in {self.max_new_tokens} new tokens")

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.prefixes)) or (0,) * self.n

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(sample_id(self.request_id, k) for k in self.indices or range(self.n))


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do; read by the runner and by the contract tests."""

    seeded: bool  # sampling noise is a function of (seed, sample id, position)
    sleep: bool  # sleep() really frees memory
    max_context: int  # prompt + response tokens


@dataclass(frozen=True)
class EngineStats:
    """Counters since the last call of stats().

    reused_tokens: prompt tokens whose keys and values were shared. truncated_mass: the probability that top-p / top-k cut off, summed over
    the decoded tokens. Filled in by the worker: memory_bytes, the peak of the engine's process or device, and peak_flops, operations per
    second in the device's data sheet (0 = not known).
    """

    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    busy_seconds: float = 0.0
    truncated_mass: float = 0.0
    memory_bytes: int = 0
    peak_flops: float = 0.0


class Counters:
    """What an engine counts between two calls of stats(). Any thread may add; nothing is lost or counted twice."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._since = EngineStats()

    def add(self, **increments: float) -> None:
        """increments: by field of EngineStats."""
        with self._lock:
            self._since = replace(self._since, **{name: getattr(self._since, name) + value for name, value in increments.items()})

    def since_last(self) -> EngineStats:
        with self._lock:
            told, self._since = self._since, EngineStats()
        return told


class RolloutEngine(Protocol):
    """One engine. Not thread-safe except where said; `generate` may run many times at once in one event loop."""

    capabilities: Capabilities

    @property
    def dead(self) -> bool:
        """Whether a process that the engine needs has died; then only close() may be called."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Sample]:
        """Yield the n samples as they finish.

        Raises ValueError for an empty or over-long prompt, RuntimeError when the engine is broken.
        """
        ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all): their iterators yield what was decoded, with finish ABORT. No token is lost."""
        ...

    async def load_weights(self, source: WeightSource, version: int) -> Receipt:
        """Load the weights in place and flush every KV and prefix cache; later tokens carry `version`. Raises on any mismatch."""
        ...

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token given those before it, at temperature 1: for a sequence of n tokens an array [n-1] float32."""
        ...

    async def sleep(self, tags: frozenset[str]) -> None:
        """Free memory. tags: `kv` (the KV cache), `weights`."""
        ...

    async def wake(self, tags: frozenset[str]) -> None:
        """Be ready to be used again; `weights` only with the next load_weights()."""
        ...

    def stats(self) -> EngineStats: ...

    async def start_trace(self, folder: Path, name: str) -> None:
        """Start torch's profiler for the engine."""
        ...

    async def stop_trace(self) -> None:
        """Stop it and write <folder>/<name>*.gz, for Perfetto or chrome://tracing. Does nothing when it was not started."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class GroupMember(Protocol):
    """An engine that is itself a member of broadcast groups, so that weights do not pass through its worker."""

    async def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup], engine: int, timeout: float) -> None:
        """Join these groups, in their order, as engine number `engine`; returns when all their members have joined."""
        ...

    async def load_weights(self, source: WeightSource | Collective, version: int) -> Receipt: ...
