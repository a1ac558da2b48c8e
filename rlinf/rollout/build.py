"""Builds the rollout engine that the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rlinf.config.schema import Config
from rlinf.device import choose, limit_memory
from rlinf.rollout.contract import RolloutEngine
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.rollout.sglang_options import ServerNode, ServerSettings


class Tokenizer(Protocol):
    """The part of a tokenizer that an engine needs."""

    def decode(self, ids: list[int]) -> str: ...


def build_engine(
    config: Config,
    tokenizer: Tokenizer,
    device: str,
    log: Path,
    run_id: str,
    on_death: Callable[[], None] | None = None,
    node: ServerNode | None = None,
) -> RolloutEngine:
    """The engine of rollout.rollout_backend with the weights of rollout.model_dir (version 0) on `device`.

    The other arguments are for SGLang's server. log: its log file. run_id: marks its files in shared memory. on_death: called when it dies.
    node: which node this is, for an engine that spans several.
    """
    rollout = config.rollout
    if rollout.rollout_backend == "sglang":
        settings = ServerSettings(
            rollout.model_dir,
            dtype=rollout.precision or config.actor.model.precision,
            slots=rollout.max_running_requests,
            max_context=config.runner.seq_length,
            seed=rollout.seed,
            device=device,
            tensor_parallel_size=rollout.tensor_parallel_size,
            memory_fraction=rollout.gpu_memory_utilization,
            memory_saver=rollout.offload,
            trust_remote_code=rollout.trust_remote_code,
            native=rollout.sglang,
            node=node,
        )
        return SGLangEngine(
            settings,
            log=log,
            run_id=run_id,
            python=rollout.sglang_python,
            start_timeout=config.cluster.start_timeout,
            on_death=on_death,
            decode=tokenizer.decode,
        )
    if config.cluster.backend == "ray":  # in one process the limit would be the actor's too
        limit_memory(choose(device), rollout.gpu_memory_utilization)
    return EmbeddedEngine(
        rollout.model_dir,
        dtype=rollout.precision or config.actor.model.precision,
        slots=rollout.max_running_requests,
        max_context=config.runner.seq_length,
        seed=rollout.seed,
        device=device,
        decode=tokenizer.decode,
    )
