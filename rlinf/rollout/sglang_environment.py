"""The environment of an SGLang server: what the user exported, and what the server would otherwise stumble over."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rlinf.errors import UserError

KERNELS = "RLINF_KERNEL_CACHE"
FOREIGN = (  # not handed on
    "PYTHONPATH", "PYTHONHOME",  # the server has an interpreter of its own
    "SGLANG_MEMORY_SAVER_CUDA_GRAPH",  # graphs in memory that sleep() does not give back, and an all-reduce that copies for them
    "SGLANG_RETURN_ORIGINAL_LOGPROB",  # log-probabilities that know nothing of the temperature
    "SGLANG_MAX_NEW_TOKENS_LIMIT",  # shorter responses than the configuration says
)  # fmt: skip
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
GROWING_BLOCKS = re.compile(r"(^|,)\s*expandable_segments:\w+")
LOOPBACK = ("127.0.0.1", "localhost")


def server_environment(options: dict[str, Any], folder: Path) -> dict[str, str]:
    """options: those that the server is started with. folder: for its sockets. Raises UserError where compiled kernels cannot be kept."""
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    if options.get("enable_memory_saver"):
        env |= without_growing_blocks(env)
    env |= {
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # a few positions of slack that no request reaches
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # an actor may hold more of one GPU of an engine than of another
    }
    # else a script in /tmp starts the schedulers, which everybody may write, and which stays there
    env.setdefault("SGLANG_NUMA_BIND_V2", "0")
    env.setdefault("SGLANG_WARMUP_TIMEOUT", "86400")  # else ten minutes: how long a start may take says cluster.start_timeout
    # where the other nodes hear of requests; else the address from which the internet is reached, or one that is none
    if options.get("nnodes", 1) > 1 and options["node_rank"] == 0:
        env.setdefault("SGLANG_HOST_IP", options["dist_init_addr"].rpartition(":")[0])
    direct = without_proxy(env)
    env |= {"no_proxy": direct, "NO_PROXY": direct}
    env = kernel_caches(env.get("SGLANG_CACHE_DIR") or str(kernel_folder() / "sglang")) | env
    if options["device"] == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        if options["tp_size"] > 1:  # unless it is told which cores each may have, SGLang refuses more ranks than NUMA nodes
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([cores] * options["tp_size"]))
    return env


def without_growing_blocks(env: dict[str, str]) -> dict[str, str]:
    """What the user says of torch's allocator, for Megatron as a rule, less the blocks that grow: the memory saver does not know them. By
    one of the two names it ends the server for them, by the other sleep() would give nothing back."""
    return {name: GROWING_BLOCKS.sub("", env[name]).lstrip(",") for name in ALLOCATOR if name in env}


def without_proxy(env: dict[str, str]) -> str:
    """The hosts that are spoken to directly: the server warms itself up by a request to itself, and ends when a proxy answers that."""
    named = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in env.get(name, "").split(",") if host.strip()]
    return "*" if "*" in named else ",".join(dict.fromkeys([*named, *LOOPBACK]))  # the star counts only where it stands alone


def kernel_caches(base: str) -> dict[str, str]:
    """Variables that name folders of compiled kernels, below `base` as SGLang lays them out. Else they may lie in TMPDIR, from which
    nothing can be mapped as code in a container (/dev/shm is mounted noexec there), or in a home that many nodes share."""
    return {
        "SGLANG_CACHE_DIR": base,
        "SGLANG_JIT_CACHE_DIR": f"{base}/jit",
        "FLASHINFER_WORKSPACE_BASE": base,  # FlashInfer adds .cache/flashinfer
        "TRITON_CACHE_DIR": f"{base}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{base}/inductor",
    }


def kernel_folder() -> Path:
    """Where this node keeps the kernels that servers compile, for those that come later. They are loaded as code: nobody else may write
    there."""
    named = os.environ.get(KERNELS)
    path = Path(named or f"/tmp/rlinf-kernels-{os.getuid()}").expanduser()
    remedy = f"set {KERNELS} to a folder of yours on a disk of this node"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create the folder for compiled kernels: {error.strerror}; {remedy}") from error
    if not named and path.lstat().st_uid != os.getuid():
        raise UserError(f"{path}: the folder for compiled kernels belongs to another user; {remedy}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder for compiled kernels is not writable; {remedy}")
    return path
