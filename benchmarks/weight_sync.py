"""A weight sync through shared memory beside memcpy: GB/s of the actor's weights into the embedded engine, two processes of one machine.

    python -m benchmarks.weight_sync MODEL_DIR [--precision auto] [--repeats 15] [--threads 2]

A sync is all that a run does for one: the actor gathers, writes and sums its weights, the engine's process maps them, checks sums and
values, puts them into the layout that decodes fastest and answers with a receipt, which is checked. The way alone, until the engine's
process has the weights mapped and knows their sums to be right, is timed beside it. Each sync has other weights. Before each, a plain
copy of as many bytes is timed, by one thread and by all. Writes benchmarks/results/weight_sync.json with medians, a case for each
precision (by default the one that this machine multiplies faster); shares are of the faster
of the two copies, and the verdict is that of the whole sync. At the end the log-probabilities of both sides are compared.

Allocator and OpenMP settings are those of a run's workers: the script starts itself again with them.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.settings import machine, restart_as_worker
from rlinf.config.schema import ActorModelConfig, OptimConfig
from rlinf.data.tokenizer import load_tokenizer
from rlinf.hardware import fast_precision
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.training import parallel
from rlinf.training.engine import MegatronEngine
from rlinf.training.publishing import Publisher, sequence_logprobs
from rlinf.weights.architecture import open_architecture
from rlinf.weights.opening import open_source
from rlinf.weights.receipts import check_probes, check_receipts
from rlinf.weights.routes import SHARED_MEMORY
from rlinf.weights.segments import Mappings
from rlinf.weights.source import Receipt, SharedMemory
from rlinf.weights.tensor_folder import open_hf_folder

RESULTS = Path(__file__).parent / "results" / "weight_sync.json"
AIM = 0.30  # of memcpy
PROBES = ("The capital of France is Paris, and the capital of Italy is Rome.", "Question: What is 2+3? Answer: 2+3=5.")
WARM_UP = 3  # syncs: memory is allocated, kernels are made


def serve(model_dir: str, precision: str, threads: int, connection: Connection) -> None:
    """The engine's process: loads what it is told of, answers with log-probabilities of what it is sent, ends when the other side does."""
    torch.set_num_threads(threads)
    engine = EmbeddedEngine(model_dir, dtype=precision, slots=64, max_context=128, seed=0, load_weights=False)
    mappings = Mappings()
    while (asked := connection.recv()) is not None:
        method, arguments = asked
        connection.send(arrive(*arguments, mappings) if method == "arrive" else asyncio.run(getattr(engine, method)(*arguments)))
    engine.close()


def arrive(source: SharedMemory, mappings: Mappings) -> int:
    """What every load begins with: map the buckets and verify their sums. Returns the number of tensors."""
    return sum(1 for _ in open_source(source, mappings))


def open_actor(model_dir: Path, precision: str) -> MegatronEngine:
    at = parallel.initialize(1, 1, rank=0, world_size=1, device=torch.device("cpu"), address="127.0.0.1:29518")
    arch = open_architecture(model_dir)
    engine = MegatronEngine(arch, ActorModelConfig(precision=precision), OptimConfig(), at, torch.device("cpu"))
    engine.load_hf(open_hf_folder(model_dir))
    return engine


class Copies:
    """Plain copies of as many bytes as the weights have."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.source, self.target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        self.nbytes, self.pool, self.threads = nbytes, ThreadPoolExecutor(threads), threads

    def rate(self, threads: int) -> float:
        """GB/s of libc's memmove, each thread at a part of its own."""
        part = self.nbytes // threads
        started = time.perf_counter()
        list(
            self.pool.map(
                lambda i: ctypes.memmove(self.target.data_ptr() + i * part, self.source.data_ptr() + i * part, part), range(threads)
            )
        )
        return part * threads / (time.perf_counter() - started) / 1e9

    def rates(self) -> dict[str, float]:
        return {"one_thread": self.rate(1), "all_threads": self.rate(self.threads)}


def sync(publisher: Publisher, engine: Connection, version: int) -> dict[str, float]:
    """Seconds of one sync and of its parts."""
    with torch.no_grad():
        publisher.engine.model.decoder.final_layernorm.weight.mul_(1 + 2**-6 * (-1) ** version)  # other weights
    started = time.perf_counter()
    source = publisher.hand_out(version, [SHARED_MEMORY]).sources[SHARED_MEMORY]
    published = time.perf_counter()
    engine.send(("arrive", (source,)))
    engine.recv()
    arrived = time.perf_counter()
    engine.send(("load_weights", (source, version)))
    receipt: Receipt = engine.recv()
    check_receipts([source], version, [receipt])
    done = time.perf_counter()
    publisher.withdraw()
    publishing = published - started
    return {"publish": publishing, "way": arrived - started, "load": receipt.seconds, "sync": publishing + done - arrived}


def verdict(nbytes: int, seconds: list[dict[str, float]], copies: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the share of memcpy that the sync and its way reach, sync by sync against the faster copy of the same moment."""
    rates = {name: statistics.median(nbytes / s[name] / 1e9 for s in seconds) for name in ("publish", "way", "load", "sync")}
    memcpy = {name: statistics.median(c[name] for c in copies) for name in copies[0]}
    way, whole = (
        statistics.median(nbytes / s[name] / 1e9 / max(c.values()) for s, c in zip(seconds, copies, strict=True))
        for name in ("way", "sync")
    )
    return {
        "gb_per_second": rates,
        "memcpy_gb_per_second": memcpy,
        "way_share_of_memcpy": way,
        "share_of_memcpy": whole,
        "aim": AIM,
        "reached": whole >= AIM,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--precision", default=fast_precision("cpu"), choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    restart_as_worker()
    torch.set_num_threads(args.threads)
    spawn = multiprocessing.get_context("spawn")
    engine, other = spawn.Pipe()
    process = spawn.Process(target=serve, args=(str(args.model_dir), args.precision, args.threads, other), daemon=True)
    process.start()
    actor = open_actor(args.model_dir, args.precision)
    nbytes = sum(t.nbytes for _, t in actor.export())
    copies, publisher = Copies(nbytes, args.threads), Publisher(actor, f"benchmark-{os.getpid()}", Path(os.devnull))
    seconds, rates = [], []
    for version in range(1, WARM_UP + args.repeats + 1):
        rates.append(copies.rates())
        seconds.append(sync(publisher, engine, version))
    probes = [np.array(load_tokenizer(str(args.model_dir)).encode(text), np.int32) for text in PROBES]
    engine.send(("sequence_logprobs", (probes,)))
    gap = check_probes(version, args.precision, sequence_logprobs(actor, probes), [engine.recv()])
    engine.send(None)
    process.join(60)
    publisher.close()
    seconds, rates = seconds[WARM_UP:], rates[WARM_UP:]
    found = verdict(nbytes, seconds, rates) | {"probe_gap_max": gap}
    cases = json.loads(args.out.read_text())["cases"] if args.out.exists() else {}
    cases[args.precision] = {"bytes": nbytes, "machine": machine(args.threads), **found, "seconds": seconds, "copies": rates}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"model": args.model_dir.name, "cases": cases}, indent=1) + "\n")
    say: Callable[[str], Any] = sys.stdout.write
    say(f"{nbytes / 1e6:.0f} MB; memcpy {found['memcpy_gb_per_second']}; sync {found['gb_per_second']} GB/s\n")
    way, whole = (f"{100 * found[name]:.0f} %" for name in ("way_share_of_memcpy", "share_of_memcpy"))
    say(f"{way} of memcpy on the way, {whole} in all, aim {100 * AIM:.0f} %; probe gap {gap:.2g}\n")


if __name__ == "__main__":
    main()
