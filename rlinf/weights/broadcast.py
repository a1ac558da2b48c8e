"""Sends weights over a process group from one publisher to many engines, without a copy in between. gloo on CPU, NCCL between GPUs.

Such a group is separate from the trainer's own groups, so engines never take part in a collective of training. Its members meet at a store
on the first actor rank. A bucket is three broadcasts: the length of its description, the description (JSON), and the bytes; a length of 0
ends the sequence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf.errors import RunFailed
from rlinf.weights.buckets import BUCKET_BYTES, Named, fill, group_into_buckets, layout
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.scan import checksums
from rlinf.weights.segments import SEGMENTS_FOLDER, create_segment
from rlinf.weights.source import BucketSpec, SharedMemory, TensorSpec

GRACE = 10.0  # seconds that the store itself has for an answer


def open_store(host: str, port: int, keeps: bool) -> dist.TCPStore:
    """The store at which the groups of a run meet. keeps: whether this process hosts it."""
    return dist.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=GRACE))


class Member:
    """A participant in the meeting of one group. It reports how far it has come, and when others do not come, says who they are.

    names: the names from group.members for which it stands. Raises RunFailed when a member does not come, or stops, within `timeout`
    seconds.
    """

    def __init__(self, group: BroadcastGroup, names: Sequence[str], store: dist.Store, timeout: float) -> None:
        self.group, self.names, self.timeout = group, tuple(names), timeout
        self.store = dist.PrefixStore(group.name, store)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        for name in self.names:
            self.store.set(f"{what}, {name}", "here")
        try:
            yield
        except RuntimeError as error:  # torch.distributed has no narrower one for a peer that is silent or gone
            missing = [m for m in self.group.members if not self.store.check([f"{what}, {m}"])]
            who = f"{', '.join(missing)} did not come" if missing else self.who_stopped()
            raise RunFailed(
                f"weight broadcast ({self.group.name}, {what}): {self.names[0]} waited for {self.timeout:g} s at most; {who}: {error}"
            ) from error

    def who_stopped(self) -> str:
        return "a member stopped in the middle"


def make_process_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout: float) -> Any:
    """A ProcessGroupNCCL between GPUs, otherwise a ProcessGroupGloo; torch declares no operations for the two. It is not registered in
    torch's list of groups, so no collective of training uses it."""
    if device.type == "cuda":
        store.set_timeout(timedelta(seconds=timeout))  # its members meet in the first broadcast, as long as the store waits
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))


class Wire(Member):
    """This process's end of one group. Its constructor returns when all members are there. device: through whose memory the bytes pass."""

    def __init__(self, group: BroadcastGroup, member: str, store: dist.Store, device: torch.device, timeout: float) -> None:
        super().__init__(group, [member], store, timeout)
        self.device = device
        with self.together("making the group"):
            rank, size = group.members.index(member), len(group.members)
            self.process_group = make_process_group(self.store, rank, size, device, timeout)

    def send(self, tensors: Iterable[Named], version: int, bucket_bytes: int = BUCKET_BYTES) -> SharedMemory:
        """Broadcast the tensors. Returns what was sent, with keys of its own."""
        sent = []
        with self.together(f"version {version}"):
            for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
                specs, nbytes = layout(bucket)
                buffer = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)  # zeros: the gaps between tensors count in the checksum
                fill(buffer, specs, bucket)
                sent.append(BucketSpec(f"{self.group.name}, v{version}-{i}", nbytes, *checksums(buffer, specs)))
                description = json.dumps([sent[-1].key, nbytes, sent[-1].checksum, sent[-1].tensors])
                described = torch.frombuffer(bytearray(description.encode()), dtype=torch.uint8)
                self._pass(torch.tensor([len(described)]))
                self._pass(described)
                self._pass(buffer)
            self._pass(torch.tensor([0]))
        return SharedMemory(tuple(sent))

    def receive(self, name: str, version: int) -> tuple[SharedMemory, dict[str, str]]:
        """Write what the publisher sends to `/dev/shm/rlinf-<name>-s<stage>-v<version>-*`. Returns the buckets, with checksums as sent, and
        for the key of each the sender's key."""
        landed: list[BucketSpec] = []
        keys: dict[str, str] = {}
        with ExitStack() as undo, self.together(f"version {version}"):
            while (length := int(self._pass(torch.zeros(1, dtype=torch.int64)))) > 0:
                description = self._pass(torch.zeros(length, dtype=torch.uint8)).numpy().tobytes()
                key, nbytes, sent, specs = json.loads(description)
                path = f"{SEGMENTS_FOLDER}/rlinf-{name}-s{self.group.stage}-v{version}-{len(landed)}"
                segment = create_segment(path, nbytes)
                undo.callback(os.unlink, path)
                self._pass(segment)
                tensors = tuple(TensorSpec(tensor, dtype, tuple(shape), *place) for tensor, dtype, shape, *place in specs)
                landed.append(BucketSpec(path, nbytes, tensors, sent))
                keys[path] = key
            undo.pop_all()
        return SharedMemory(tuple(landed)), keys

    def _pass(self, tensor: Tensor) -> Tensor:
        """One broadcast from the publisher; `tensor`, with what it sent."""
        there = tensor.to(self.device)
        self.process_group.broadcast(there, 0).wait(timedelta(seconds=self.timeout))
        return tensor if there is tensor else tensor.copy_(there)
