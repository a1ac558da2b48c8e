"""An engine that spans nodes, on all of its nodes but the first: holds the server's processes there, and takes no requests."""

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
    """Nobody calls it and nobody waits for it: when its processes do not start, or die, it ends, which ends the run and names its node."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        torch.set_num_threads(address.threads)
        others = nodes_of_engine(config, address) - 1
        engine, place = divmod(address.rank, others)
        folder = config.runner.run_dir
        own = folder / "workers" / f"rollout-{engine}-engine-part-{place + 1}.log"
        tokenizer = tokenizer_of(config)
        try:
            node = ServerNode(others + 1, place + 1, heard(meeting_file(folder, engine, address.run_id), config.cluster.start_timeout))
            self.engine = build_engine(
                config, tokenizer, choose(config.cluster.device).type, own, address.run_id, lambda: leave(f"see {own}"), node
            )
        except (RunFailed, UserError) as error:
            leave(str(error))

    def close(self) -> None:
        self.engine.close()


def leave(why: str) -> None:
    """End this process; its last lines are what the driver shows."""
    log.error("the processes of SGLang on this node ended: %s", why)
    os._exit(1)


def nodes_of_engine(config: Config, address: WorkerAddress) -> int:
    """An engine that spans nodes has as many devices on each."""
    return config.rollout.tensor_parallel_size // len(address.devices)


def meeting_file(folder: Path, engine: int, run_id: str) -> Path:
    """Where the first node of an engine tells the others its address, in the run's folder, which all nodes see."""
    return folder / "workers" / f"rollout-{engine}-{run_id}.address"


def tell(file: Path, address: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(address)
    partial.rename(file)


def heard(file: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not file.exists():
        if time.monotonic() > deadline:
            raise RunFailed(f"{file} was not written within {timeout:g} s (cluster.start_timeout) by the first node of the engine")
        time.sleep(0.2)
    return file.read_text()
