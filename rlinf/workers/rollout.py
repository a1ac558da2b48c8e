"""The rollout worker: one engine, called a group at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlinf.config.schema import Config
from rlinf.data.records import Group, GroupHeader, Prompt, Sample
from rlinf.data.tokenizer import load_tokenizer
from rlinf.rollout.build import build_engine
from rlinf.rollout.contract import EngineStats, GenerateRequest
from rlinf.scheduling.placement import WorkerAddress
from rlinf.weights.source import Receipt, WeightSource


class RolloutWorker:
    """Implements workers.interfaces.RolloutWorker; `generate` may run many times at once in one event loop."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.address = address
        torch.set_num_threads(address.threads)
        tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code)
        cuda = torch.cuda.is_available() if config.cluster.device == "auto" else config.cluster.device == "cuda"
        self.engine = build_engine(config, tokenizer, "cuda" if cuda else "cpu")

    async def generate(self, request: GenerateRequest, prompt: Prompt) -> tuple[GroupHeader, Group]:
        """The group of a prompt, samples in the order of their index."""
        samples: dict[str, Sample] = {sample.sample_id: sample async for sample in self.engine.generate(request)}
        group = Group(request.request_id, prompt, tuple(samples[f"{request.request_id}/{k}"] for k in range(request.n)))
        return group.header(), group

    async def load_weights(self, source: WeightSource, version: int) -> Receipt:
        return await self.engine.load_weights(source, version)

    async def score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        return await self.engine.score(sequences, temperature)

    async def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        self.engine.close()
