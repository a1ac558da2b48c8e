"""Embedded rollout engine against transformers.generate: tokens a second, interleaved, medians of one run.

    python -m benchmarks.rollout_engine MODEL_DIR [--dtype auto] [--threads 2] [--repeats 5] [--cases equal tail group]

equal   32 prompts of 32 tokens, 32 new tokens each, 32 rows
tail    64 prompts of 32 tokens, new tokens of a long-tailed distribution (the longest 8 times the median), 32 rows
group   8 prompts of 75 tokens, 8 samples each, 24 new tokens, 64 rows

Both sides sample at temperature 1 without an end token, return log-probabilities, and count only tokens that were asked for. They take
turns, and the one that begins changes; the first turn is not counted. The engine has as many slots as transformers has rows in a batch.
Prints the ratio of the medians for each case beside what is aimed at and writes benchmarks/results/rollout_engine.json. Allocator and
OpenMP settings are those of a run's workers for both sides: the script starts itself again with them. The precision is that of both sides,
by default the one that this machine multiplies faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.settings import machine, restart_as_worker
from rlinf.hardware import fast_precision
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.embedded_engine import EmbeddedEngine

RESULTS = Path(__file__).parent / "results" / "rollout_engine.json"
AIMS = {"equal": 1.5, "tail": 2.0, "group": 3.0}  # times the tokens a second of transformers


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

    def prompts(count: int, length: int) -> list[np.ndarray]:
        return [rng.integers(10, vocab, length).astype(np.int32) for _ in range(count)]

    if name == "equal":
        return Case(prompts(32, 32), 1, [32] * 32, 32)
    if name == "group":
        return Case(prompts(8, 75), 8, [24] * 8, 64)
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


def verdict(name: str, ours: list[float], theirs: list[float]) -> dict[str, object]:
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {
        "ratio": ratio,
        "aim": AIMS[name],
        "reached": ratio >= AIMS[name],
        "engine_tokens_per_second": ours,
        "transformers_tokens_per_second": theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", default=fast_precision("cpu"), choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(AIMS), choices=list(AIMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    restart_as_worker()
    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype)
    model.generation_config.eos_token_id = None
    results: dict[str, dict[str, object]] = json.loads(args.out.read_text())["cases"] if args.out.exists() else {}

    def speeds(engine: EmbeddedEngine, case: Case, ours_first: bool) -> tuple[float, float]:
        runs: list[Callable[[], None]] = [lambda: run_engine(engine, case), lambda: run_transformers(model, case)]
        order = (0, 1) if ours_first else (1, 0)
        found = {i: case.tokens / seconds(runs[i]) for i in order}
        return found[0], found[1]

    vocab = model.config.vocab_size
    for name in args.cases:
        cases = [make_case(name, vocab, repeat) for repeat in range(args.repeats + 1)]
        engine = EmbeddedEngine(str(args.model_dir), dtype=args.dtype, slots=cases[0].batch, max_context=256, seed=0)
        _, *pairs = [speeds(engine, case, i % 2 == 0) for i, case in enumerate(cases)]
        engine.close()
        found = verdict(name, [ours for ours, _ in pairs], [theirs for _, theirs in pairs])
        results[name if args.dtype == "bf16" else f"{name}, fp32"] = found | {"machine": machine(args.threads)}
        sys.stdout.write(f"{name}: {pairs}; ratio {found['ratio']:.2f}, aim {AIMS[name]}\n")
        sys.stdout.flush()
        report = {"model": args.model_dir.name, "cases": results}
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
