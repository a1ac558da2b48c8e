"""A rollout worker that answers from a script: prompt metadata cannot carry it, so the script is a file named in the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from rlinf.config.schema import Config
from rlinf.data.records import Finish, Group, GroupHeader, Prompt, Sample
from rlinf.data.tokenizer import tokenizer_of
from rlinf.rollout.contract import GenerateRequest
from rlinf.scheduling.placement import WorkerAddress

SCRIPT = "RLINF_TEST_ANSWERS"  # path of a JSON file: problem id -> list of answers, one a sample; "cut" in front makes it a truncated one


class ScriptedRollout:
    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.tokenizer = tokenizer_of(config)
        self.answers = json.loads(Path(os.environ[SCRIPT]).read_text())

    async def generate(self, request: GenerateRequest, prompt: Prompt) -> tuple[GroupHeader, Group]:
        first = int(request.request_id.rpartition("/")[2])
        samples = []
        for k in range(request.n):
            text = self.answers[prompt.prompt_id][first + k]
            finish = Finish.LENGTH if text.startswith("cut") else Finish.STOP
            ids = np.array(self.tokenizer.encode(text.removeprefix("cut")), dtype=np.int32)
            samples.append(
                Sample(
                    f"{request.request_id}/{k}", ids, np.zeros(len(ids), np.float32), np.ones(len(ids), np.uint8), ((0, len(ids)),), finish
                )
            )
        group = Group(request.request_id, prompt, tuple(samples))
        return group.header(), group

    def close(self) -> None:
        return
