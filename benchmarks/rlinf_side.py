"""Our side of benchmarks/vs_trl.py, run by it: `rlinf train` that waits for a line on stdin before each step.

    python -m benchmarks.rlinf_side CONFIG key=value ...

The end token is a token like others: nothing ends before algorithm.sampling_params.max_new_tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from rlinf.cli import main
from rlinf.launch import train as launch
from rlinf.rollout.contract import Stop
from rlinf.runners.reasoning import ReasoningRunner
from rlinf.runners.training_loop import StepResult

ANSWERS = os.fdopen(os.dup(1), "w")


def say(**words: Any) -> None:
    ANSWERS.write(json.dumps(words) + "\n")
    ANSWERS.flush()


class GatedRunner(ReasoningRunner):
    async def begin(self) -> None:
        await super().begin()
        say(ready=True)

    async def take_step(self) -> StepResult:
        if not await asyncio.to_thread(sys.stdin.readline):
            sys.exit("the other side has gone")
        started = time.perf_counter()
        result = await super().take_step()
        seconds = time.perf_counter() - started
        samples = self.config.data.rollout_batch_size * self.config.algorithm.group_size
        mean, longest = result.metrics["rollout/response_length"], result.metrics["rollout/response_length_max"]
        prompt = result.metrics["rollout/total_tokens"] / samples - mean
        say(
            seconds=seconds,
            prompt_tokens=[prompt],
            response_tokens=sorted({mean, longest}),
            samples=samples,
            phases=dict(self.timers.seconds),
        )
        return result


if __name__ == "__main__":
    os.dup2(2, 1)  # what the run prints does not come between
    launch.ReasoningRunner = GatedRunner  # type: ignore[misc]
    launch.stop_of = lambda *_: Stop()
    sys.exit(main(["train", *sys.argv[1:]]))
