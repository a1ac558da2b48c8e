"""The worker on each further node of an engine that spans several nodes: it keeps the server's processes there, and takes no requests."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch

from rlinf.config.schema import Config
from rlinf.data.tokenizer import tokenizer_of
from rlinf.device import choose
from rlinf.errors import RunFailed, UserError
from rlinf.rollout.build import build_engine
from rlinf.rollout.sglang_options import ServerNode
from rlinf.scheduling.placement import WorkerAddress

log = logging.getLogger(__name__)


class RolloutPart:
    """It is never called. When its processes do not start, or die, it ends its own process, which ends the run with a message that names
    the node."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        torch.set_num_threads(address.threads)
        others = nodes_of_engine(config, address) - 1
        engine, place = divmod(address.rank, others)
        folder = config.runner.run_dir
        own = folder / "workers" / f"rollout-{engine}-engine-part-{place + 1}.log"
        tokenizer = tokenizer_of(config)
        try:
            node = ServerNode(
                others + 1, place + 1, wait_for_address(meeting_file(folder, engine, address.run_id), config.cluster.start_timeout)
            )
            self.engine = build_engine(
                config, tokenizer, choose(config.cluster.device).type, own, address.run_id, lambda: leave(f"see {own}"), node
            )
        except (RunFailed, UserError) as error:
            leave(str(error))

    def close(self) -> None:
        self.engine.close()


def leave(why: str) -> None:
    """End this process. The driver shows the last lines of its log."""
    log.error("the processes of SGLang on this node ended: %s", why)
    os._exit(1)


def nodes_of_engine(config: Config, address: WorkerAddress) -> int:
    """The number of nodes that an engine spans; it has the same number of devices on each."""
    return config.rollout.tensor_parallel_size // len(address.devices)


def meeting_file(folder: Path, engine: int, run_id: str) -> Path:
    """The file in which the first node of an engine writes its address for the others, in the run's folder, which all nodes can read."""
    return folder / "workers" / f"rollout-{engine}-{run_id}.address"


def wait_for_address(file: Path, timeout: float) -> str:
    """The address, when the first node has written it. Raises RunFailed after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not file.exists():
        if time.monotonic() > deadline:
            raise RunFailed(f"{file} was not written within {timeout:g} s (cluster.start_timeout) by the first node of the engine")
        time.sleep(0.2)
    return file.read_text()
