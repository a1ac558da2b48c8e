"""The training engine against plain transformers + torch, and a shared prompt against a copy for each sample: CPU seconds of one step.

    python -m benchmarks.trainer MODEL_DIR [--pairs 15] [--threads 1] [--precision bf16] [--cases plain 75-20-8 256-32-8 64-256-8 equal]

plain     eight sequences of 96 tokens, loss on the last 48: forward, backward, clipping, Adam on fp32 master weights, new bf16 weights.
          Both sides see the same tokens. The plain side is as good as it can be had: equal lengths, so nothing is padded and attention is
          torch's causal kernel; logits at the trained positions alone; torch's fused Adam.
P-R-G     one GRPO step on G responses of R tokens to one prompt of P tokens, packed with a copy of the prompt for each sample, and as
          the engine packs it by itself. The gain is compared with the ratio of the tokens.
equal     one GRPO step on four groups of eight responses (75-20-8), two of which have equal rewards, with a backward pass for all and for
          those alone that have a gradient. Of the whole step, optimizer included.

Arms alternate within a process, the order turning from pair to pair; CPU time, not wall time, so that other work on the machine counts
little. The bound is the 95th percentile of the ratio of means over 10,000 bootstrap resamples of the pairs. Writes
benchmarks/results/trainer.json. Allocator settings are the same for both sides: the script starts itself again with them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.settings import machine, restart_as_worker
from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.objective import ObjectiveSettings
from rlinf.algorithms.supervised import supervised_objective
from rlinf.config.schema import ActorModelConfig, OptimConfig
from rlinf.data.examples import example
from rlinf.data.packing import build_rank_batches
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.training import parallel
from rlinf.training.engine import MegatronEngine
from rlinf.training.packed_batch import pack
from rlinf.weights.architecture import open_architecture
from rlinf.weights.tensor_folder import open_hf_folder

RESULTS = Path(__file__).parent / "results" / "trainer.json"
OPTIM = OptimConfig(lr=1e-6, adam_eps=1e-8, weight_decay=0.0, clip_grad=1.0)
SETTINGS = ObjectiveSettings("ppo", "token-mean", 0.2, 0.2, None, 0.0, "k3", 0.0, None, 256)
SEQUENCES, LENGTH, TRAINED = 8, 96, 48
SHAPES = {"75-20-8": (75, 20, 8), "256-32-8": (256, 32, 8), "64-256-8": (64, 256, 8)}
RESAMPLES = 10_000
Step = Callable[[], float]  # does the work and returns the loss


def open_engine(model_dir: Path, precision: str) -> MegatronEngine:
    at = parallel.initialize(1, 1, rank=0, world_size=1, device=torch.device("cpu"), address="127.0.0.1:29517")
    arch = open_architecture(model_dir)
    engine = MegatronEngine(arch, ActorModelConfig(precision=precision), OPTIM, at, torch.device("cpu"))
    engine.load_hf(open_hf_folder(model_dir))
    return engine


def engine_step(engine: MegatronEngine, tokens: np.ndarray) -> Step:
    groups = [example(f"e{i}", row[: LENGTH - TRAINED], row[LENGTH - TRAINED :]) for i, row in enumerate(tokens)]
    weights = torch.full((SEQUENCES * TRAINED,), 1 / (SEQUENCES * TRAINED), dtype=torch.float64)

    def step() -> float:
        (share,) = build_rank_batches(
            [g.header() for g in groups], [np.ones(1)] * len(groups), dp=1, n_minibatches=1, max_tokens=4096, share_prefix=True
        )
        packs = [
            pack(groups, refs, share_prefix=True, temperature=1.0, pad_to=1, device=engine.device)
            for refs in share.mini_batches[0].micro_batches
        ]
        update = engine.optimize(packs, lambda i, output: supervised_objective(*output, weights))
        return update.metrics.sums["objective"].item()

    return step


def plain_step(model: torch.nn.Module, tokens: np.ndarray) -> Step:
    """Weights and gradients in the model's precision, fp32 master weights and moments: what the engine keeps too."""
    params = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(
        masters, lr=OPTIM.lr, betas=(OPTIM.adam_beta1, OPTIM.adam_beta2), eps=OPTIM.adam_eps, weight_decay=0.0, fused=True
    )
    ids = torch.from_numpy(tokens.astype(np.int64))
    positions = torch.arange(LENGTH - TRAINED - 1, LENGTH - 1)

    def step() -> float:
        logits = model(input_ids=ids, logits_to_keep=positions, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, LENGTH - TRAINED :].flatten())
        loss.backward()
        for master, param in zip(masters, params):
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, OPTIM.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, param in zip(masters, params):
                param.copy_(master)
        return loss.item()

    return step


def make_group(vocab: int, shape: tuple[int, int, int], name: str = "g", seed: int = 0) -> Group:
    rng, (prompt, response, n) = np.random.default_rng(seed), shape
    samples = tuple(
        Sample(
            f"{name}/{i}",
            rng.integers(10, vocab, response).astype(np.int32),
            np.zeros(response, np.float32),
            np.ones(response, np.uint8),
            ((0, response),),
            Finish.STOP,
        )
        for i in range(n)
    )
    return Group(name, Prompt(name, rng.integers(10, vocab, prompt).astype(np.int32), "math", ("",)), samples)


def grpo_step(
    engine: MegatronEngine, groups: Sequence[Group], share_prefix: bool = True, equal: int = 0, zero_teaches: bool = True
) -> Step:
    """equal: how many of the groups, from the first on, have equal rewards."""
    advantages = [np.linspace(-1, 1, len(g.samples)).astype(np.float32) * (k >= equal) for k, g in enumerate(groups)]
    headers = [g.header() for g in groups]
    how: dict[str, Any] = {"dp": 1, "n_minibatches": 1, "max_tokens": 4096, "share_prefix": share_prefix, "zero_teaches": zero_teaches}

    def step() -> float:
        (share,) = build_rank_batches(headers, advantages, **how)
        (mini,) = share.mini_batches
        packs = [
            pack(groups, refs, share_prefix=share_prefix, temperature=1.0, pad_to=1, device=engine.device) for refs in mini.micro_batches
        ]
        denominators = Denominators(mini.global_tokens, mini.global_samples)
        update = engine.update(packs, None, None, denominators, SETTINGS, None, mini.teaching)
        return update.grad_norm

    return step


def measure(arms: dict[str, Step], pairs: int) -> dict[str, Any]:
    """CPU seconds of both arms, pair by pair, after one step of each to warm up; and what each gave in that step."""
    given = {name: step() for name, step in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for pair in range(pairs):
        for name in list(arms)[:: 1 if pair % 2 else -1]:
            start = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - start)
    return {"given": given, "cpu_seconds": seconds}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Ratio of the means, with the 5th and 95th percentile over bootstrap resamples of the pairs."""
    a, b = np.array(above), np.array(below)
    picks = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.quantile(a[picks].mean(1) / b[picks].mean(1), (0.05, 0.95))
    return {
        "ratio": float(a.mean() / b.mean()),
        "p5": float(low),
        "p95": float(high),
        "ratio_of_medians": float(np.median(a) / np.median(b)),
    }


def against_plain(engine: MegatronEngine, model_dir: Path, pairs: int) -> dict[str, Any]:
    dtype = next(engine.model.parameters()).dtype
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").train()
    tokens = np.random.default_rng(0).integers(10, engine.arch.vocab, (SEQUENCES, LENGTH)).astype(np.int32)
    result = measure({"engine": engine_step(engine, tokens), "plain": plain_step(model, tokens)}, pairs)
    found = ratio(result["cpu_seconds"]["engine"], result["cpu_seconds"]["plain"])
    sys.stdout.write(f"plain: engine / plain {found['ratio']:.3f}, 95 % upper bound {found['p95']:.3f} (aim 1.20)\n")
    return (
        result
        | found
        | {"tokens": SEQUENCES * LENGTH, "trained_tokens": SEQUENCES * TRAINED, "aim": "p95 <= 1.20", "reached": found["p95"] <= 1.20}
    )


def shared_prefix(engine: MegatronEngine, name: str, pairs: int) -> dict[str, Any]:
    prompt, response, n = SHAPES[name]
    group = make_group(engine.arch.vocab, SHAPES[name])
    result = measure({"copies": grpo_step(engine, [group], False), "automatic": grpo_step(engine, [group])}, pairs)
    found = ratio(result["cpu_seconds"]["copies"], result["cpu_seconds"]["automatic"])
    tokens = n * (prompt + response) / (prompt + n * response)
    aim = 0.75 * tokens if name != "64-256-8" else 0.95
    sys.stdout.write(
        f"{name}: gain {found['ratio']:.2f} [{found['p5']:.2f}, {found['p95']:.2f}], token ratio {tokens:.2f}, aim {aim:.2f}\n"
    )
    return (
        result
        | found
        | {"token_ratio": tokens, "share_of_token_ratio": found["ratio"] / tokens, "aim": aim, "reached": found["ratio"] >= aim}
    )


def equal_groups(engine: MegatronEngine, pairs: int) -> dict[str, Any]:
    groups = [make_group(engine.arch.vocab, SHAPES["75-20-8"], f"g{k}", seed=k) for k in range(4)]
    arms = {"all": grpo_step(engine, groups, equal=2), "with a gradient": grpo_step(engine, groups, equal=2, zero_teaches=False)}
    result = measure(arms, pairs)
    found = ratio(result["cpu_seconds"]["all"], result["cpu_seconds"]["with a gradient"])
    sys.stdout.write(f"equal: gain {found['ratio']:.2f} [{found['p5']:.2f}, {found['p95']:.2f}], aim 1.25\n")
    return result | found | {"aim": 1.25, "reached": found["ratio"] >= 1.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--cases", nargs="+", default=["plain", *SHAPES, "equal"], choices=("plain", *SHAPES, "equal"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    restart_as_worker()
    torch.set_num_threads(args.threads)
    engine = open_engine(args.model_dir, args.precision)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: against_plain(engine, args.model_dir, args.pairs),
        "equal": lambda: equal_groups(engine, args.pairs),
    } | {name: partial(shared_prefix, engine, name, args.pairs) for name in SHAPES}
    earlier = json.loads(args.out.read_text())["cases"] if args.out.exists() else {}
    for name in args.cases:
        about = {"machine": machine(args.threads), "pairs": args.pairs, "precision": args.precision}
        earlier[name] = cases[name]() | about
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"model": args.model_dir.name, "cases": earlier}, indent=1) + "\n")


if __name__ == "__main__":
    main()
