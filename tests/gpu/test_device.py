"""The device module, the collectives' library, and the clusters that hand devices out."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from rlinf import device as devices
from rlinf import hardware
from rlinf.checks.doctor import OK, collectives
from rlinf.cluster.cluster import Cluster
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed
from rlinf.scheduling.placement import Plan, Seat
from rlinf.weights.broadcast import Wire, open_store
from rlinf.weights.device_ipc import DeviceBuckets
from rlinf.weights.opening import open_source
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.scan import checksums
from rlinf.weights.source import DeviceIpc

MIB = 2**20


def test_auto_is_the_device_of_this_machine(device: torch.device) -> None:
    assert devices.choose("auto") == devices.choose(device.type) == device
    assert devices.usable() == hardware.has_gpu() == (device.type == "cuda")
    assert hardware.fast_precision("auto") == hardware.fast_precision(device.type)
    assert device.type == "cpu" or hardware.fast_precision("auto") == "bf16"
    assert device.type == "cpu" or not torch.backends.cuda.cudnn_sdp_enabled()  # it would plan anew for every length of a sample


def test_memory_of_a_tensor_is_seen_and_given_back(device: torch.device) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # what other tests leave behind would come and go meanwhile
        fresh.submit(_a_tensor_comes_and_goes, device).result()


def _a_tensor_comes_and_goes(device: torch.device) -> None:
    devices.give_back_free_memory(device)
    devices.forget_peak(device)
    before = devices.memory_in_use(device)
    tensor = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    devices.synchronize(device)
    assert 60 * MIB <= devices.memory_in_use(device) - before <= 80 * MIB
    del tensor
    devices.give_back_free_memory(device)
    assert devices.memory_in_use(device) - before <= 16 * MIB
    assert devices.peak_memory(device) >= before + 60 * MIB - (0 if device.type == "cuda" else 60 * MIB)


def test_a_host_copy_is_complete_and_pinned_where_a_gpu_writes_it(device: torch.device) -> None:
    tensor = torch.arange(1 << 16, device=device)
    copy = devices.host_copy(tensor)
    assert copy.device.type == "cpu" and copy.is_pinned() == (device.type == "cuda")
    assert torch.equal(copy, torch.arange(1 << 16))
    tensor += 1
    assert devices.host_copy(tensor, into=copy) is copy and copy[0] == 1


@pytest.mark.gpu
def test_beyond_its_share_a_process_fails() -> None:
    device = devices.choose("cuda")
    devices.limit_memory(device, 0.05)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(devices.gpu_memory() // 10, dtype=torch.uint8, device=device)
    finally:
        devices.limit_memory(device, 1.0)


@pytest.mark.gpu
def test_the_gpu_says_who_it_is() -> None:
    assert devices.gpu_count() >= 1 and devices.gpu_name()
    assert 0 < devices.free_gpu_memory() <= devices.gpu_memory()
    assert len(devices.nccl_version()) == 3


def test_the_collectives_library_sums(device: torch.device) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # other tests' process may have joined a group for good
        found = fresh.submit(collectives, device.type == "cuda").result()
    assert (found.check, found.status) == ("nccl" if device.type == "cuda" else "gloo", OK)


def test_a_publisher_broadcasts_from_its_device(device: torch.device) -> None:
    """Alone in its group: between devices it takes as many of them. A later version is another checksum."""
    store = open_store("127.0.0.1", 0, keeps=True)
    wire = Wire(BroadcastGroup(0, 0, 0, ()), "actor rank 0", store, device, 60.0)
    sent = [
        wire.send([("a", torch.full((100, 8), 1.0 + version, device=device)), ("b", torch.ones(3, device=device))], version)
        for version in (0, 1)
    ]
    assert [[t.name for b in source.buckets for t in b.tensors] for source in sent] == [["a", "b"], ["a", "b"]]
    assert sent[0].buckets[0].checksum != sent[1].buckets[0].checksum


def test_another_process_sees_the_buckets_of_this_one(device: torch.device) -> None:
    """Version after version, bit for bit; a damaged one is refused, and what was handed out comes back."""
    publisher = DeviceBuckets("gpu-test", device)
    before = devices.memory_in_use(device)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        for version in (1, 2):
            tensors = [(name, torch.arange(MIB, device=device) * version) for name in "abc"]
            source = publisher.publish(tensors, version, bucket_bytes=10 * MIB)
            assert [b.checksum for b in source.buckets] == [checksums(b.cpu(), ())[1] for b in publisher._offered.values()]
            assert other.submit(_looked_at, source, device).result() == {name: int(t.sum()) for name, t in tensors}
            assert len(list(open_source(source))) == 3  # this process looks at its own memory
            publisher._offered[source.buckets[-1].key][-1] ^= 1
            with pytest.raises(RunFailed, match="v.-2: tensor c, checksum"):
                other.submit(_looked_at, source, device).result()
            publisher.withdraw()
        del tensors
        assert device.type == "cpu" or devices.memory_in_use(device) == before
        assert "rlinf-gpu-test" not in Path("/proc/self/maps").read_text()


def _looked_at(source: DeviceIpc, device: torch.device) -> dict[str, int]:
    found = {name: int(tensor.sum()) for name, tensor in open_source(source) if tensor.device == device}
    devices.synchronize(device)
    return found


@pytest.mark.gpu
def test_a_checksum_makes_no_copy_of_the_bucket() -> None:
    device = devices.choose("cuda")
    buffer = torch.ones(512 * MIB, dtype=torch.uint8, device=device)
    devices.forget_peak(device)
    before = devices.memory_in_use(device)
    assert checksums(buffer, ()) == checksums(buffer.cpu(), ())
    assert devices.peak_memory(device) - before <= 256 * MIB


@pytest.mark.gpu
def test_memory_that_nobody_opens_comes_back() -> None:
    device = devices.choose("cuda")
    publisher = DeviceBuckets("gpu-test", device)
    before = devices.memory_in_use(device)
    source = publisher.publish([("a", torch.ones(MIB, device=device))], 1)
    assert len(list(open_source(source))) == 1 and devices.memory_in_use(device) >= before + 4 * MIB
    publisher.withdraw()
    assert devices.memory_in_use(device) == before


def test_one_process_takes_the_device_that_is_there(device: torch.device, tmp_path: Path) -> None:
    config = ClusterConfig(backend="local", component_placement={"actor,rollout,reward": "0"})
    cluster = Cluster.connect(config, "gpu-test", tmp_path)
    try:
        assert cluster.device == device.type
    finally:
        cluster.close()


@pytest.mark.gpu
def test_a_ray_worker_sees_its_own_gpu_alone(tmp_path: Path) -> None:
    config = ClusterConfig(num_gpus_per_node=1, device="cuda", threads_per_worker=1, start_timeout=120)
    cluster = Cluster.connect(config, "gpu-ray-test", tmp_path)
    try:
        group = cluster.launch(Plan((Seat("actor", 0, 0, (0,)),), "collocated"), "actor", "tests.cluster_workers:Plain")
        (told,) = asyncio.run(group.call_all("describe"))
        assert told["env"]["CUDA_VISIBLE_DEVICES"] == "0" and told["env"]["NCCL_CUMEM_ENABLE"] == os.environ["NCCL_CUMEM_ENABLE"]
        assert cluster.device == "cuda" and [node.devices for node in cluster.inventory()] == [1]
    finally:
        cluster.close()
