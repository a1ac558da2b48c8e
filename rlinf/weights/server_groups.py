"""Sends weights over a process group whose other members are the ranks of rollout servers: from the publisher directly into their memory.

A server joins a group by torch's `tcp://` rendezvous, at the store where all groups of the run meet, and must be told names, dtypes and
shapes before it takes part in a broadcast. Its worker tells it: the worker is not a member itself, and reads the publisher's descriptions
at the store, one bucket at a time. Each tensor of a bucket is one broadcast.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import xxhash

from rlinf.errors import RunFailed
from rlinf.weights.broadcast import Member, make_process_group
from rlinf.weights.buckets import BUCKET_BYTES, Named, group_into_buckets, layout
from rlinf.weights.finite import finite
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.source import Broadcast, BucketSpec, TensorSpec

MAKING = "making the group"
LAST_WORDS = 5.0  # seconds that a worker has to say why its server left


class ServerWire(Member):
    """The publisher's end. Servers do not notice bad tensors, so the publisher sends none that is not finite."""

    def __init__(self, group: BroadcastGroup, store: dist.Store, device: torch.device, timeout: float) -> None:
        super().__init__(group, group.members[:1], store, timeout)
        self.device = device
        self.round = 0
        self.keys: list[str] = []  # of the descriptions that are still there
        there = store
        for prefix in (group.name, f"{group.name}/", f"{device.type}/"):  # as torch.distributed names what a rendezvous made
            there = dist.PrefixStore(prefix, there)
        with self.together(MAKING):
            self.process_group = make_process_group(there, 0, len(group.members), device, timeout)

    def send(self, tensors: Iterable[Named], version: int, bucket_bytes: int = BUCKET_BYTES) -> Broadcast:
        """Broadcast the tensors. Returns what was sent, with keys of its own. Raises RunFailed that names a tensor which is not finite."""
        sent: list[BucketSpec] = []
        with self.together(_coming(version, self.round)):
            for bucket in group_into_buckets(tensors, bucket_bytes):
                not_finite = next((name for name, tensor in bucket if not finite(tensor)), None)
                if not_finite:
                    raise RunFailed(f"weights of version {version} are not sent: tensor {not_finite} holds values that are not finite")
                sent.append(self._describe(bucket, f"{self.group.name}, v{version}-{len(sent)}", len(sent)))
                whole = [tensor.to(self.device).contiguous() for _, tensor in bucket]
                for work in [self.process_group.broadcast(tensor, 0) for tensor in whole]:
                    work.wait(timedelta(seconds=self.timeout))
            self._say("", len(sent))
        self.round += 1
        return Broadcast(tuple(sent))

    def who_stopped(self) -> str:
        """A server's worker knows it a moment later."""
        deadline = time.monotonic() + LAST_WORDS
        while time.monotonic() < deadline:
            for engine in self.group.engines:
                if self.store.check([_words(engine)]):
                    return f"rollout rank {engine} stopped: {self.store.get(_words(engine)).decode()}"
            time.sleep(0.05)
        return super().who_stopped()

    def forget(self) -> None:
        """Remove the descriptions from the store; everybody has read them."""
        for key in self.keys:
            self.store.delete_key(key)
        self.keys = []

    def _describe(self, bucket: Sequence[Named], key: str, count: int) -> BucketSpec:
        specs, nbytes = layout(bucket)
        description = json.dumps([key, nbytes, specs])
        self._say(description, count)
        return BucketSpec(key, nbytes, specs, xxhash.xxh3_64_intdigest(description.encode()))

    def _say(self, description: str, count: int) -> None:
        self.keys.append(_place(self.round, count))
        self.store.set(self.keys[-1], description)


class Follower(Member):
    """The worker of one server: reads what will be broadcast, and represents the server where the members meet."""

    def __init__(self, group: BroadcastGroup, engine: int, store: dist.Store, timeout: float) -> None:
        super().__init__(group, group.names_of(engine), store, timeout)
        self.engine = engine
        self.first_rank = group.members.index(self.names[0])
        self.round = 0

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        with super().together(what):
            try:
                yield
            except RuntimeError as error:  # the server is gone, or stands still: the publisher, who waits for it, is told
                self.store.set(_words(self.engine), str(error))
                raise

    def coming(self, version: int) -> str:
        """The name of the next meeting: the broadcast of `version`."""
        return _coming(version, self.round)

    def descriptions(self) -> Iterator[BucketSpec]:
        """The buckets of the next round, each when the publisher comes to it; each must be received before the next is taken. Blocks."""
        count = 0
        while description := self._wait_for(_place(self.round, count)):
            key, nbytes, specs = json.loads(description)
            tensors = tuple(TensorSpec(name, dtype, tuple(shape), *place) for name, dtype, shape, *place in specs)
            yield BucketSpec(key, nbytes, tensors, xxhash.xxh3_64_intdigest(description))
            count += 1
        self.round += 1

    def _wait_for(self, key: str) -> bytes:
        self.store.wait([key], timedelta(seconds=self.timeout))
        return self.store.get(key)


def _place(round_: int, count: int) -> str:
    return f"round {round_}, bucket {count}"


def _coming(version: int, round_: int) -> str:
    return f"version {version}, round {round_}"


def _words(engine: int) -> str:
    return f"last words of rollout rank {engine}"
