from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlinf.errors import UserError
from rlinf.rollout.sglang_environment import kernel_folder, server_environment

CPU, FOLDER = {"device": "cpu", "tp_size": 1}, Path("/dev/shm/a-server")


@pytest.fixture(autouse=True)
def own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*os.environ,):
        if name.startswith(("SGLANG_", "TRITON_", "TORCHINDUCTOR_", "FLASHINFER_")) or name.lower() == "no_proxy":
            monkeypatch.delenv(name)
    monkeypatch.setenv("RLINF_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_starts_on_gpus_of_which_an_actor_holds_unequal_parts(device: str) -> None:
    env = server_environment({"device": device, "tp_size": 2}, FOLDER)
    assert env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    assert ("SGLANG_USE_CPU_ENGINE" in env) == (device == "cpu")


@pytest.mark.parametrize(
    ("lower", "upper", "direct"),
    [
        (None, None, "127.0.0.1,localhost"),
        ("a.example, .b", None, "a.example,.b,127.0.0.1,localhost"),
        ("localhost", "c", "localhost,c,127.0.0.1"),
        (None, "*", "*"),
    ],
)
def test_a_server_speaks_to_itself_past_any_proxy(
    lower: str | None, upper: str | None, direct: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    for name, value in (("no_proxy", lower), ("NO_PROXY", upper)):
        if value is not None:
            monkeypatch.setenv(name, value)
    env = server_environment(CPU, FOLDER)
    assert (env["no_proxy"], env["NO_PROXY"], env["http_proxy"]) == (direct, direct, "http://proxy.example:3128")


def test_kernels_are_kept_on_a_disk_of_the_node_where_the_user_names_no_other_place(
    own_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ("SGLANG_CACHE_DIR", "SGLANG_JIT_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    env = server_environment(CPU, FOLDER)
    assert all(Path(env[name]).is_relative_to(own_kernels) for name in named) and env["TMPDIR"] == str(FOLDER)
    assert own_kernels.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/triton")
    assert server_environment(CPU, FOLDER)["TRITON_CACHE_DIR"] == "/scratch/triton"
    monkeypatch.setenv("SGLANG_CACHE_DIR", "/scratch/sglang")
    assert server_environment(CPU, FOLDER)["TORCHINDUCTOR_CACHE_DIR"] == "/scratch/sglang/inductor"


def test_a_folder_for_kernels_that_is_not_ours_is_refused(own_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_kernels.write_text("a file")
    with pytest.raises(UserError, match=f"{own_kernels}: cannot create .*: File exists; set RLINF_KERNEL_CACHE"):
        kernel_folder()
    monkeypatch.delenv("RLINF_KERNEL_CACHE")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr(Path, "lstat", lambda path: os.stat_result((0o40777, 0, 0, 0, os.getuid() + 1, 0, 0, 0, 0, 0)))
    with pytest.raises(UserError, match="/tmp/rlinf-kernels-.*belongs to another user; set RLINF_KERNEL_CACHE"):
        kernel_folder()


@pytest.mark.parametrize(
    ("name", "ours"), [("SGLANG_NUMA_BIND_V2", "0"), ("SGLANG_WARMUP_TIMEOUT", "86400")], ids=["script", "ten minutes"]
)
def test_schedulers_need_no_script_that_everybody_may_write_and_a_start_has_one_limit(
    name: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server_environment(CPU, FOLDER)[name] == ours
    monkeypatch.setenv(name, "1")
    assert server_environment(CPU, FOLDER)[name] == "1"


def test_an_engine_over_nodes_is_heard_at_the_address_where_its_nodes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOST_IP may be that of the machine around a container."""
    monkeypatch.setenv("HOST_IP", "192.0.2.1")
    first, second = (CPU | {"nnodes": 2, "node_rank": rank, "dist_init_addr": "10.0.0.1:20001"} for rank in (0, 1))
    assert server_environment(first, FOLDER)["SGLANG_HOST_IP"] == "10.0.0.1"
    assert all("SGLANG_HOST_IP" not in server_environment(options, FOLDER) for options in (second, CPU))
    monkeypatch.setenv("SGLANG_HOST_IP", "10.1.0.1")
    assert server_environment(first, FOLDER)["SGLANG_HOST_IP"] == "10.1.0.1"


@pytest.mark.parametrize("name", ["SGLANG_MEMORY_SAVER_CUDA_GRAPH", "SGLANG_RETURN_ORIGINAL_LOGPROB", "SGLANG_MAX_NEW_TOKENS_LIMIT"])
def test_what_would_break_the_contract_of_an_engine_is_not_handed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in memory that is given back, log-probabilities at another temperature, shorter responses."""
    monkeypatch.setenv(name, "1")
    assert name not in server_environment(CPU, FOLDER)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("expandable_segments:True", ""),
        ("expandable_segments:True,max_split_size_mb:512", "max_split_size_mb:512"),
        ("roundup_power2_divisions:[256:1,512:2], expandable_segments:True", "roundup_power2_divisions:[256:1,512:2]"),
    ],
)
def test_blocks_that_grow_are_not_for_a_server_that_gives_memory_back(
    name: str, given: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, given)
    gpu = {"device": "cuda", "tp_size": 1}
    assert server_environment(gpu, FOLDER)[name] == given
    env = server_environment(gpu | {"enable_memory_saver": True}, FOLDER)
    assert env[name] == left and len({"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & env.keys()) == 1
