"""The parts of the acceptance (rlinf.checks.acceptance), each in a process of its own.

    python -m rlinf.checks.acceptance_parts PART FOLDER [--cpu]

A part returns its figures; `problem` among them says what is wrong, `remark` what to know of a part that is well. They are written to
FOLDER/PART.json.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rlinf import device as devices
from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.objective import ObjectiveSettings
from rlinf.checks import doctor
from rlinf.checks.layout import ADAPTED, SPLITS, Case, Finding, judge, measure
from rlinf.checks.layout_reference import make_batch, plain_steps
from rlinf.checks.tiny_model import FAMILIES, VOCAB, write_model, write_tiny_model, write_tiny_tokenizer
from rlinf.config.schema import ActorModelConfig, OptimConfig
from rlinf.data.packing import SampleRef
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.errors import RunFailed
from rlinf.hardware import free_port
from rlinf.metrics.logger import read_metrics
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.scheduling.flops import forward_flops
from rlinf.training import parallel
from rlinf.training.engine import MegatronEngine
from rlinf.training.packed_batch import PackedBatch, pack
from rlinf.training.publishing import Publisher, sequence_logprobs
from rlinf.weights.architecture import Architecture, read_architecture
from rlinf.weights.receipts import check_probes
from rlinf.weights.routes import DEVICE_IPC, SHARED_MEMORY
from rlinf.weights.source import Broadcast
from rlinf.workers.device import peak_flops
from rlinf.workers.megatron import work_of

ROOT = Path(__file__).resolve().parents[2]
GPU_SLACK = 10.0  # other kernels sum in another order: of the layout check's tolerances, which are CPU's
STEPS, MICRO_BATCHES = 3, 2
SETTINGS = ObjectiveSettings("ppo", "token-mean", 0.2, 0.2, None, 0.0, "k3", 0.0, None, 1 << 20)
QWEN3_06B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = QWEN3_06B | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
TINY = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


def part_doctor(folder: Path, cpu: bool, model: Path | None) -> dict[str, Any]:
    found = list(doctor.examine(None))
    sys.stdout.write("\n".join(f.line() for f in found) + "\n")
    failed = [f"{f.check}: {f.text}" for f in found if f.status == doctor.FAIL]
    return {"findings": [f.line() for f in found]} | ({"problem": "; ".join(failed)} if failed else {})


def part_tests(folder: Path, cpu: bool, model: Path | None) -> dict[str, Any]:
    xml_file = folder / "tests.xml"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests" / "gpu"), f"--junitxml={xml_file}", "-p", "no:cacheprovider"]
    return judge_tests(xml_file, subprocess.run(words, cwd=ROOT).returncode, cpu)


def judge_tests(xml_file: Path, code: int, cpu: bool) -> dict[str, Any]:
    """Counts of a run of pytest, and why tests were skipped. It is a problem when one failed, or when more were skipped than passed on a
    machine that is there to run them."""
    suite = next(xml.etree.ElementTree.parse(xml_file).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - sum(counts[name] for name in ("failures", "errors", "skipped"))
    why = Counter(skip.get("message", "") for skip in suite.iter("skipped")).most_common()
    told = f"{passed} passed, {counts['failures'] + counts['errors']} failed" if code else f"{passed} passed"
    if why:
        told += f", {counts['skipped']} skipped: " + "; ".join(f"{reason} ({count})" for reason, count in why)
    bad = code != 0 or (not cpu and counts["skipped"] >= passed)
    return counts | {"passed": passed, "problem" if bad else "remark": told}


def part_parity(folder: Path, cpu: bool, model: Path | None) -> dict[str, Any]:
    """One process, one device, every packing; the reference is computed on CPU."""
    at = join(cpu)
    cases = [Case(1, 1, 1, False, family, *split) for family in FAMILIES for split in SPLITS[:: 1 if not cpu else 5]]
    adapted = Case(1, 1, 1, False, "qwen2", *SPLITS[2], adapters=next(iter(ADAPTED)))
    cases = [*cases[:2], adapted] if cpu else [*cases, Case(1, 1, 1, False, "qwen3", *SPLITS[2], head="scalar"), adapted]
    batch = make_batch(VOCAB)
    advantage = float(np.mean([abs(a) for group in batch.advantages for a in group]))
    findings: list[tuple[Case, Finding]] = []
    for name in {c.model: c for c in cases}:
        mine = [c for c in cases if c.model == name]
        weights = write_tiny_model(folder / "models" / name, mine[0].family, head=mine[0].head)
        expected = plain_steps(weights, batch, mine[0].head, ADAPTED[mine[0].adapters])
        findings += [(c, judge(c, [measure(at, c, str(weights), batch, kind(cpu).type)], expected, advantage, 0.0)) for c in mine]
    worst = {field: max(getattr(f, field) for _, f in findings) for field in ("loss", "gradient", "norm", "metric", "weight")}
    slack = 1.0 if cpu else GPU_SLACK
    bad = [c.label() for c, f in findings if not f.within(slack)]
    return {"cases": len(findings), "slack": slack} | worst | ({"problem": f"{len(bad)} differ, first: {bad[0]}"} if bad else {})


def part_run(folder: Path, cpu: bool, model: Path | None) -> dict[str, Any]:
    """Run `rlinf train` once, with SGLang where it can be imported, and Ray where it is installed."""
    engine = "sglang" if not cpu and importlib.util.find_spec("sglang") else "embedded"
    backend = "ray" if not cpu and importlib.util.find_spec("ray") else "local"
    weights = model or write_tiny_tokenizer(write_model(folder / "models" / "run", TINY if cpu else SMALL))
    data = folder / "run.jsonl"
    questions = [{"prompt": f"{i}+{i}=", "task": "math", "query_id": str(i), "solutions": [f"\\boxed{{{2 * i}}}"]} for i in range(64)]
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    new_tokens = 16 if cpu else 256
    config: dict[str, dict[str, Any]] = {
        "cluster": {"backend": backend, "device": kind(cpu).type, "num_gpus_per_node": 1,
                    "component_placement": {"actor,rollout,reward": "0"}},
        "runner": {"output_dir": str(folder / "logs"), "experiment_name": f"run-{time.time_ns()}", "max_steps": 3,
                   "seq_length": new_tokens + 64, "max_tokens_per_mbs": 4096, "val_check_interval": 0, "save_interval": -1},
        "data": {"train_data_paths": [str(data)], "max_prompt_length": 64, "rollout_batch_size": 2 if cpu else 16},
        "algorithm": {"group_size": 4, "n_minibatches": 2, "sampling_params": {"max_new_tokens": new_tokens}},
        "rollout": {"model_dir": str(weights), "rollout_backend": engine, "max_running_requests": 32, "verify_weights_every": 1,
                    "gpu_memory_utilization": 0.4, "offload": True},
        "actor": {"model": {"precision": "fp32" if cpu else "bf16"}, "optim": {"lr": 1e-5}, "offload_weight": True, "offload_grad": True,
                  "offload_optimizer": True},
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    code = subprocess.run([sys.executable, "-m", "rlinf", "train", str(file)], cwd=ROOT).returncode
    figures: dict[str, Any] = {"engine": engine, "backend": backend, "model": str(model or "random weights")}
    if code != 0:
        return figures | {"problem": f"rlinf train ended with exit code {code}"}
    steps = read_metrics(Path(config["runner"]["output_dir"]) / config["runner"]["experiment_name"])
    last = steps[-1]
    names = (
        "time/step",
        "time/rollout",
        "time/train",
        "time/sync_weights",
        "sync/probe_gap_max",
        "train/rollout_logprob_gap_max",
        "perf/actor_memory_gib",
    )
    figures |= {"steps": len(steps)} | {name: last[name] for name in names if name in last}
    broken = [name for name in ("train/loss", "train/grad_norm", "sync/probe_gap_max") if not math.isfinite(last[name])]
    wrong = len(steps) != 3 or broken
    return figures | ({"problem": f"{len(steps)} of 3 steps; not finite: {', '.join(broken) or 'none'}"} if wrong else {})


def part_trainer(folder: Path, cpu: bool, model: Path | None) -> dict[str, Any]:
    at = join(cpu)
    of_15b = json.loads((ROOT / "examples/math/config/models/DeepSeek-R1-Distill-Qwen-1.5B.json").read_text())
    shapes = {"tiny": TINY} if cpu else {"0.6B": QWEN3_06B, "1.5B": of_15b}
    rows = []
    for name, hf in shapes.items():
        arch = read_architecture(hf)
        engine = random_engine(arch, at, cpu)
        for tokens in (64, 128) if cpu else (4096, 16384, 32768):
            try:
                rows.append({"shape": name, "tokens": tokens} | time_steps(engine, tokens))
            except torch.OutOfMemoryError:
                rows.append({"shape": name, "tokens": tokens, "error": "out of memory"})
            devices.give_back_free_memory(engine.device)
            sys.stdout.write(f"{rows[-1]}\n")
        precision = str(engine.config.params_dtype)
        del engine  # the next one needs its memory
    problem = {} if any("error" not in row for row in rows) else {"problem": "no shape fits this device"}
    return {"rows": rows, "micro_batches": MICRO_BATCHES, "precision": precision} | problem


def part_sync(folder: Path, cpu: bool, model: Path | None) -> dict[str, Any]:
    """Measure the GB/s of each half of a weight sync, and of plain copies on the same device."""
    at = join(cpu)
    hf = TINY if cpu else json.loads((ROOT / "examples/math/config/models/DeepSeek-R1-Distill-Qwen-1.5B.json").read_text())
    arch, weights = read_architecture(hf), folder / "models" / "sync"
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "config.json").write_text(json.dumps(hf))
    for name, text in (("tokenizer.json", "{}"), ("model.safetensors", "")):  # an engine asks that they are there; nothing here reads them
        (weights / name).write_text(text)
    probes = [np.random.default_rng(i).integers(1, arch.vocab, 24 + i).astype(np.int32) for i in range(4)]
    precision = "fp32" if cpu else "bf16"
    engine = EmbeddedEngine(str(weights), dtype=precision, slots=4, max_context=128, seed=0, device=kind(cpu).type, load_weights=False)
    actor = random_engine(arch, at, cpu)
    publisher = Publisher(actor, f"acceptance-{os.getpid()}", folder / "weights")
    figures: dict[str, Any] = {}
    try:
        for transport, place in ((SHARED_MEMORY, "shared memory"), (DEVICE_IPC, "buckets on the device")):
            figures |= time_syncs(actor, publisher, engine, transport, place, probes, precision)
    except RunFailed as error:
        return {"problem": str(error)}
    finally:
        publisher.close()
        engine.close()
    return figures | copy_bandwidth(kind(cpu), (1 << 24) if cpu else (1 << 30))


def time_syncs(
    actor: MegatronEngine,
    publisher: Publisher,
    engine: EmbeddedEngine,
    transport: str,
    place: str,
    probes: list[np.ndarray],
    precision: str,
) -> dict[str, Any]:
    """Time STEPS syncs, after one that also creates the buffers. Actor and engine are in one process."""
    published, loaded, gaps, nbytes = [], [], [], 0
    for version in range(1, STEPS + 2):
        started = time.perf_counter()
        source = publisher.hand_out(version, [transport]).sources[transport]
        published.append(time.perf_counter() - started)
        assert not isinstance(source, Broadcast)  # that is for servers alone
        receipt = asyncio.run(engine.load_weights(source, version))
        loaded.append(receipt.seconds)
        nbytes = receipt.nbytes
        received = asyncio.run(engine.sequence_logprobs(probes))
        gaps.append(check_probes(version, precision, sequence_logprobs(actor, probes), [received]))
    publisher.withdraw()
    rate = lambda seconds: nbytes / statistics.median(seconds[1:]) / 1e9
    whole = [a + b for a, b in zip(published, loaded)]
    rates = {f"actor to {place}": rate(published), f"{place} to engine": rate(loaded), f"whole sync by {place}": rate(whole)}
    return rates | {"nbytes": nbytes, f"probe_gaps by {place}": gaps}


def copy_bandwidth(device: torch.device, nbytes: int) -> dict[str, float]:
    """GB/s of copies, by source and target. A copy on the device counts its bytes once."""
    on_device, other = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = devices.host_copy(on_device)
    found = {}
    pairs = {
        "copy on the device": (on_device, other),
        "copy to pinned memory": (on_device, pinned),
        "copy from pinned memory": (pinned, other),
    }
    for name, (source, target) in pairs.items():
        seconds = []
        for _ in range(6):
            devices.synchronize(device)
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            devices.synchronize(device)
            seconds.append(time.perf_counter() - started)
        found[name] = nbytes / statistics.median(seconds[1:]) / 1e9
    return found


def time_steps(engine: MegatronEngine, tokens: int) -> dict[str, Any]:
    """The median time of STEPS train steps, after one to warm up, on sequences of `tokens` tokens, one in each micro-batch."""
    packs, denominators = long_batch(engine, tokens)
    seconds = []
    devices.forget_peak(engine.device)
    for _ in range(STEPS + 1):
        devices.synchronize(engine.device)
        started = time.perf_counter()
        engine.update(packs, None, None, denominators, SETTINGS, None)
        devices.synchronize(engine.device)
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[1:])
    flops, peak = 3 * forward_flops(engine.arch, work_of(packs)), peak_flops(engine.device)  # without what is computed again
    return {
        "tokens_per_second": MICRO_BATCHES * tokens / step, "seconds": step, "tflops": flops / step / 1e12,
        "mfu": flops / step / peak if peak else None, "peak_gib": devices.peak_memory(engine.device) / 2**30,
    }  # fmt: skip


def long_batch(engine: MegatronEngine, tokens: int) -> tuple[list[PackedBatch], Denominators]:
    """A batch of MICRO_BATCHES sequences; an eighth of each is the prompt."""
    rng, prompt = np.random.default_rng(0), tokens // 8
    length = tokens - prompt
    packs = []
    for i in range(MICRO_BATCHES):
        ids = rng.integers(1, engine.arch.vocab, tokens).astype(np.int32)
        sample = Sample(f"{i}/0", ids[prompt:], np.full(length, -1.0, np.float32), np.ones(length, np.uint8), ((0, length),), Finish.STOP)
        group = Group(str(i), Prompt(str(i), ids[:prompt], "math", ("",)), (sample,))
        packs.append(pack([group], [SampleRef(0, 0, 1.0)], share_prefix=True, temperature=1.0, pad_to=1, device=engine.device))
    return packs, Denominators(MICRO_BATCHES * length, MICRO_BATCHES)


def kind(cpu: bool) -> torch.device:
    return devices.choose("cpu" if cpu else "cuda")


def join(cpu: bool) -> parallel.Coordinates:
    """Create process groups of one rank."""
    return parallel.initialize(1, 1, rank=0, world_size=1, device=kind(cpu), address=f"127.0.0.1:{free_port('127.0.0.1')}")


def random_engine(arch: Architecture, at: parallel.Coordinates, cpu: bool) -> MegatronEngine:
    """An actor with random weights, with full activation recompute."""
    model = ActorModelConfig(
        precision="fp32" if cpu else "bf16", recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    engine = MegatronEngine(arch, model, OptimConfig(lr=1e-6), at, kind(cpu))
    with torch.no_grad():
        for _, param in engine.state.params:
            param.normal_(0, 0.02) if param.ndim > 1 else param.fill_(1.0)
    engine.optimizer.reload_model_params()
    return engine


PARTS: dict[str, Callable[[Path, bool, Path | None], dict[str, Any]]] = {
    "doctor": part_doctor, "tests": part_tests, "parity": part_parity, "run": part_run, "trainer": part_trainer, "sync": part_sync,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    figures = PARTS[args.part](args.folder, args.cpu, args.model)
    (args.folder / f"{args.part}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
