from __future__ import annotations

from dataclasses import replace

import pytest

from rlinf.cluster.host import Setup, seat_environment
from rlinf.scheduling.placement import WorkerAddress

SEAT = WorkerAddress("actor", 3, 8, 0, (1, 2), "127.0.0.1", 0, "run", 4, "127.0.0.1")


def environment(cuda: bool, component: str = "actor") -> dict[str, str]:
    return seat_environment(replace(SEAT, component=component), Setup("log", "/", 3, 8, cuda, "127.0.0.1", False))


def test_a_seat_on_gpus_sees_its_own_and_speaks_nccl_as_sglang_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's processes have NCCL_CUMEM_ENABLE=0 unless they inherit another; a broadcast needs the same at both ends."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    env = environment(cuda=True)
    assert (env["CUDA_VISIBLE_DEVICES"], env["NCCL_CUMEM_ENABLE"]) == ("1,2", "0")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    assert environment(cuda=True)["NCCL_CUMEM_ENABLE"] == "1"


def test_kernels_of_megatron_stand_in_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every node: the shell of the driver does not reach workers of other nodes. An engine has its own ideas; a user's word counts."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    told = {name: environment(True, name).get("CUDA_DEVICE_MAX_CONNECTIONS") for name in ("actor", "critic", "token_reward", "rollout")}
    assert told == {"actor": "1", "critic": "1", "token_reward": "1", "rollout": None}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment(False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert environment(True)["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_a_seat_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    env = environment(cuda=False)
    assert env["CUDA_VISIBLE_DEVICES"] == "" and "NCCL_CUMEM_ENABLE" not in env
    assert (env["RANK"], env["LOCAL_RANK"], env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"]) == ("3", "3", "4", "lo")
