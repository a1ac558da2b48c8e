"""The task fits the model: before training SmolLM2 boxes its answers and gets some of the sums right, so there is something to learn."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from rlinf.config.schema import DataConfig
from rlinf.data.arithmetic import generate
from rlinf.data.prompts import load_prompts
from rlinf.data.records import Prompt
from rlinf.data.tokenizer import load_tokenizer
from rlinf.rewards.math.extract import last_box
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.embedded_engine import EmbeddedEngine

MODEL = Path(os.environ.get("RLINF_CACHE") or "~/.cache/rlinf").expanduser() / "models" / "SmolLM2-135M-Instruct"


async def greedy(engine: EmbeddedEngine, prompt: Prompt, stop: Stop) -> np.ndarray:
    request = GenerateRequest(prompt.prompt_id, prompt.token_ids, 1, SamplingParams(temperature=0.0), stop, 24)
    return [sample async for sample in engine.generate(request)][0].token_ids


async def answers(engine: EmbeddedEngine, prompts: list[Prompt], stop: Stop) -> list[np.ndarray]:
    return await asyncio.gather(*(greedy(engine, prompt, stop) for prompt in prompts))


@pytest.mark.slow
def test_greedy_accuracy_at_the_start_leaves_room_both_ways(tmp_path: Path) -> None:
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"{MODEL} is missing; toolkits/setup/fetch_smollm2.py makes it")
    tokenizer = load_tokenizer(str(MODEL))
    prompts, _ = load_prompts([str(generate(tmp_path, 1300, 256, seed=1234)["val"])], DataConfig(), tokenizer)
    engine = EmbeddedEngine(str(MODEL), dtype="bf16", slots=64, max_context=192, seed=0, decode=tokenizer.decode)
    responses = asyncio.run(answers(engine, prompts, Stop(tokenizer.eos_token_ids, ("\n",))))
    engine.close()
    boxes = [last_box(tokenizer.decode(ids.tolist())) for ids in responses]
    boxed = np.mean([box is not None for box in boxes])
    right = np.mean([f"\\boxed{{{box}}}" in prompt.solutions for box, prompt in zip(boxes, prompts)])
    assert boxed >= 0.9, f"boxed {boxed:.3f}"
    assert 0.2 <= right <= 0.6, f"right {right:.3f}"
