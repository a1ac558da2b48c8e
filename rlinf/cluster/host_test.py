from __future__ import annotations

from dataclasses import replace

import pytest

from rlinf.cluster.host import Setup, seat_environment
from rlinf.scheduling.placement import WorkerAddress

SEAT = WorkerAddress("actor", 3, 8, 0, (1, 2), "127.0.0.1", 0, "run", 4, "127.0.0.1")


def environment(cuda: bool, component: str = "actor", transport: str | None = "auto") -> dict[str, str]:
    setup = Setup("log", "/", 3, 8, cuda, "127.0.0.1", sentinel=False, transport=transport)
    return seat_environment(replace(SEAT, component=component), setup)


@pytest.fixture(autouse=True)
def nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
        "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("component", ["actor", "rollout", "rollout_part"])
def test_a_seat_on_gpus_sees_its_own_and_broadcasts_as_sglang_does(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's processes have NCCL_CUMEM_ENABLE=0 unless they inherit another; a broadcast needs the same at both ends, and nothing else
    does: without cuMem there is no NVLS."""
    env = environment(True, component, "broadcast")
    assert (env["CUDA_VISIBLE_DEVICES"], env["NCCL_CUMEM_ENABLE"]) == ("1,2", "0")
    assert all("NCCL_CUMEM_ENABLE" not in environment(True, component, other) for other in ("auto", "disk", "device_ipc", None))
    assert "NCCL_CUMEM_ENABLE" not in environment(False, component, "broadcast")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    assert environment(True, component, "broadcast")["NCCL_CUMEM_ENABLE"] == "1"


def test_kernels_of_megatron_stand_in_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every node: the shell of the driver does not reach workers of other nodes. An engine has its own ideas; a user's word counts."""
    names = ("actor", "critic", "token_reward", "rollout", "rollout_part")
    told = [environment(True, name).get("CUDA_DEVICE_MAX_CONNECTIONS") for name in names]
    assert told == ["1", "1", "1", None, None]
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment(False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert environment(True)["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_a_rank_compiles_without_a_pool_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks would start 256 of them on a node whose cores judge answers. An engine compiles more."""
    told = [environment(True, name).get("TORCHINDUCTOR_COMPILE_THREADS") for name in ("actor", "critic", "rollout")]
    assert told == ["1", "1", None]
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "8")
    assert environment(True)["TORCHINDUCTOR_COMPILE_THREADS"] == "8"


@pytest.mark.parametrize(
    ("component", "transport", "grow"),
    [
        ("actor", "auto", True),
        ("actor", "disk", True),
        ("critic", "broadcast", True),
        ("actor", None, True),
        ("actor", "device_ipc", False),
        ("actor", "one of tomorrow", False),
        ("rollout", "auto", False),
        ("rollout_part", "broadcast", False),
    ],
)
def test_blocks_of_memory_grow_where_no_other_process_opens_them(
    component: str, transport: str | None, grow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "PYTORCH_CUDA_ALLOC_CONF"
    assert environment(True, component, transport).get(name) == ("expandable_segments:True" if grow else None)
    assert name not in environment(False, component, transport)
    if grow:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")  # its newer name
        assert name not in environment(True, component, transport)
        monkeypatch.setenv(name, "backend:native")
        assert environment(True, component, transport).get(name, "backend:native") == "backend:native"


def test_process_groups_take_the_interface_of_the_seat_unless_another_was_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes a name without = for the beginning of one: eth1 is eth10, too. gloo has no such sign."""
    env = environment(True)
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("=lo", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "bond")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    env = environment(True)
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("bond", "bond0")


def test_a_seat_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    env = environment(cuda=False)
    assert env["CUDA_VISIBLE_DEVICES"] == "" and "NCCL_CUMEM_ENABLE" not in env
    assert (env["RANK"], env["LOCAL_RANK"], env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"]) == ("3", "3", "4", "lo")
