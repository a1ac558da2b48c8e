"""Embedded rollout engine against transformers.generate: tokens a second, interleaved, medians of one run.

    python benchmarks/rollout_engine.py MODEL_DIR [--dtype bf16] [--threads 2] [--repeats 3] [--cases equal tail group]

equal   32 prompts of 32 tokens, 32 new tokens each
tail    64 prompts of 32 tokens, new tokens of a long-tailed distribution (the longest 8 times the median), 32 at a time
group   8 prompts of 75 tokens that share their first 60, 8 samples each, 24 new tokens

Both sides sample at temperature 1 without an end token, return log-probabilities, and count only tokens that were asked for.
Prints a ratio for each case and writes benchmarks/results/rollout_engine.json. Allocator and OpenMP settings are the caller's, the
same for both sides, and are written down.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.embedded_engine import EmbeddedEngine

RESULTS = Path(__file__).parent / "results" / "rollout_engine.json"
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True)
class Case:
    """prompts [P], samples of each, new tokens of each prompt's samples, and the batch that transformers decodes at once."""

    prompts: list[np.ndarray]
    n: int
    lengths: list[int]
    batch: int

    @property
    def tokens(self) -> int:
        return self.n * sum(self.lengths)


def make_case(name: str, vocab: int, repeat: int) -> Case:
    """Other prompts in every repetition: nothing of an earlier one can be reused."""
    rng = np.random.default_rng(repeat)

    def prompts(count: int, length: int, shared: int = 0) -> list[np.ndarray]:
        head = rng.integers(10, vocab, shared)
        return [np.concatenate([head, rng.integers(10, vocab, length - shared)]).astype(np.int32) for _ in range(count)]

    if name == "equal":
        return Case(prompts(32, 32), 1, [32] * 32, 32)
    if name == "group":
        return Case(prompts(8, 75, 60), 8, [24] * 8, 64)
    lengths = np.exp(np.random.default_rng(0).normal(np.log(20), 0.9, 64)).astype(int).clip(4, 160)
    lengths[0] = 160
    return Case(prompts(64, 32), 1, lengths.tolist(), 32)


def run_engine(engine: EmbeddedEngine, case: Case) -> None:
    async def together() -> None:
        async def one(i: int) -> int:
            request = GenerateRequest(f"r{i}", case.prompts[i], case.n, SamplingParams(), Stop(), case.lengths[i])
            return sum([len(s) async for s in engine.generate(request)])

        assert sum(await asyncio.gather(*(one(i) for i in range(len(case.prompts))))) == case.tokens

    asyncio.run(together())


@torch.inference_mode()
def run_transformers(model: torch.nn.Module, case: Case) -> None:
    rows = [(p, n) for p, n in zip(case.prompts, case.lengths) for _ in range(case.n)]
    for start in range(0, len(rows), case.batch):
        part = rows[start : start + case.batch]
        ids = torch.tensor(np.stack([p for p, _ in part]).astype(np.int64))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(n for _, n in part), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        for t, logits in enumerate(out.logits):
            torch.log_softmax(logits.float(), -1).gather(1, new[:, t : t + 1])


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def machine(threads: int) -> dict[str, object]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": threads, "load_average": os.getloadavg(), "python": platform.python_version(),
        "torch": torch.__version__, "environment": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["equal", "tail", "group"], choices=("equal", "tail", "group"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = EmbeddedEngine(args.model_dir, dtype=args.dtype, slots=64, max_context=512, seed=0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype)
    model.generation_config.eos_token_id = None
    results = {}
    for name in args.cases:
        ours, theirs = [], []
        for repeat in range(args.repeats):
            case = make_case(name, model.config.vocab_size, repeat)
            ours.append(case.tokens / seconds(lambda: run_engine(engine, case)))
            theirs.append(case.tokens / seconds(lambda: run_transformers(model, case)))
        ratio = statistics.median(ours) / statistics.median(theirs)
        results[name] = {"ratio": ratio, "engine_tokens_per_second": ours, "transformers_tokens_per_second": theirs}
        medians = f"engine {statistics.median(ours):.0f} tok/s, transformers {statistics.median(theirs):.0f} tok/s"
        sys.stdout.write(f"{name}: {medians}, ratio {ratio:.2f}\n")
        RESULTS.parent.mkdir(exist_ok=True)
        report = {"model": Path(args.model_dir).name, "dtype": args.dtype, "machine": machine(args.threads), "cases": results}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
