"""What the driver costs: its CPU seconds a step at 128 to 1,024 devices, and its memory over many steps.

    python -m benchmarks.driver_scale [--steps 3] [--memory-steps 200]

The driver is the real one: runner, dispatcher, worker groups, Ray, advantages, packing, weight sync, metrics. 32 Ray actors stand in for
its workers (benchmarks/light_workers.py): they take and return the real payload types, with arrays of realistic sizes, and compute
nothing. For more devices than processes a group is widened: rank r of `devices` ranks is actor r mod n, so that every call of a large
run is made, with its own arguments, and only the far end is shared. The configuration is qwen2.5-1.5b-grpo-megatron: with N devices
N actor ranks (TP 2), N engines, N / 8 reward workers.

Calls: one step of each size is recorded, and its calls are made again with the same arguments and nothing around them: the cost of a
call of each kind, times their number. The model takes these costs at 128 devices, and is held against the calls of 1,024. The aims are
for the calls; what the whole driver takes, its own work included, is measured beside them. Calls that are on their way together cost
less than those that come one by one, as the groups of a long step do: what such a call costs is measured, too, and says how far the aims
are from such a step. Writes benchmarks/results/driver_scale.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.light_workers import Light
from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import Ref
from rlinf.cluster.processes import new_run_id
from rlinf.cluster.ray_group import RayWorkerGroup
from rlinf.config.load import Resolved, load
from rlinf.data.records import Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.names import METRICS
from rlinf.rollout.contract import Stop
from rlinf.run_folder.folder import RunFolder
from rlinf.runners.learner import MegatronGroups
from rlinf.runners.reasoning import ReasoningRunner
from rlinf.runners.training_loop import frozen_heap
from rlinf.scheduling.placement import build_plan
from rlinf.weights.architecture import read_architecture
from rlinf.weights.buckets import group_into_buckets, layout
from rlinf.weights.mapping import hf_shapes
from rlinf.weights.source import BucketSpec

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "driver_scale.json"
RECIPE, MODEL = "qwen2.5-1.5b-grpo-megatron", ROOT / "examples/math/config/models/DeepSeek-R1-Distill-Qwen-1.5B.json"
SEATS = {"actor": "0-15", "rollout": "16-27", "reward": "28-31"}
WORKERS = {"actor": "LightActor", "rollout": "LightRollout", "reward": "LightReward"}
GROUP_SIZE, MEAN_TOKENS = 16, 2000
STEP_SECONDS = 100.0
AIMS = {128: 0.02, 1024: 0.05}  # share of a step of STEP_SECONDS
FITTED = [(128, 8192), (128, 16384)]  # devices, samples a step
MEASURED = [*FITTED, (1024, 8192), (1024, 16384)]
MEMORY_DEVICES, MEMORY_SAMPLES = 16, 1024
ROUNDS = 3  # how often the calls of a kind are made again; the median counts
SETTLE = 0.5  # seconds in which Ray frees what nobody has any more
APART, GAP = 64, 0.02  # calls of a kind that are made one by one, and the seconds between them, in which the process falls asleep


class Recorder(RayWorkerGroup):
    """A group that notes its calls while `noted` is a list: rank, method, arguments, number of results.

    together: the methods whose results are waited for by all ranks at once.
    """

    noted: list[tuple[int, str, tuple[Any, ...], int]] | None = None
    together: frozenset[str] = frozenset()

    def submit(self, rank: int, method: str, args: tuple[Any, ...], returns: int) -> list[Any]:
        if self.noted is not None:
            self.noted.append((rank, method, args, returns))
        return super().submit(rank, method, args, returns)

    async def results(self, refs: Sequence[Ref]) -> list[Any]:
        self.together |= {ref.method for ref in refs}
        return await super().results(refs)


class Meter(MetricLogger):
    """A MetricLogger that reads the clocks of this process at the end of every step, and has `groups` note the calls of the last."""

    def __init__(self, run_dir: Path, last_step: int, groups: Iterable[Recorder]) -> None:
        super().__init__(run_dir, ["tensorboard"])
        self.last_step_of_run, self.groups = last_step, tuple(groups)
        self.cpu, self.wall, self.rss = [time.process_time()], [time.perf_counter()], [resident_bytes()]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())
        self.rss.append(resident_bytes())
        for group in self.groups:
            group.noted = [] if step == self.last_step_of_run - 1 else group.noted


@dataclass(frozen=True)
class Calls:
    """How often a method was called in a step, with how many payloads, and the CPU seconds of the driver for it; apart: for one call that
    comes by itself, with what the process takes while it waits for the next."""

    count: int
    payloads: int
    seconds: float
    apart: float = 0.0


@dataclass(frozen=True)
class Load:
    """CPU and wall seconds of the driver in each step, resident bytes after it, the calls of one step by component and method, and what
    they cost when they are made alone, by `component.method`."""

    devices: int
    samples: int
    cpu: list[float]
    wall: list[float]
    rss: list[int]
    calls: dict[str, dict[str, int]]
    alone: dict[str, Calls]

    @property
    def groups(self) -> int:
        return self.samples // GROUP_SIZE

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    @property
    def seconds_of_calls(self) -> float:
        return sum(calls.seconds for calls in self.alone.values())


@dataclass(frozen=True)
class Model:
    """CPU seconds of the driver for a call, by `component.method`: of the call as such, and of each payload in its arguments."""

    per_call: dict[str, float]
    per_payload: dict[str, float]

    def seconds(self, alone: Mapping[str, Calls]) -> float:
        return sum(self.per_call[kind] * calls.count + self.per_payload[kind] * calls.payloads for kind, calls in alone.items())


def fit(loads: Sequence[Load]) -> Model:
    """Least squares over the loads for each kind of call. All of the cost is the call's where it has as many payloads in all of them, and
    where the noise is such that one of the two would be below zero."""
    per_call, per_payload = {}, {}
    for kind in loads[0].alone:
        found = [load.alone[kind] for load in loads]
        rows, seconds = np.array([[calls.count, calls.payloads] for calls in found], float), np.array([calls.seconds for calls in found])
        both, _, rank, _ = np.linalg.lstsq(rows, seconds, rcond=None)
        alone, *_ = np.linalg.lstsq(rows[:, :1], seconds, rcond=None)
        per_call[kind], per_payload[kind] = map(float, both if rank == 2 and both.min() >= 0 else (alone[0], 0.0))
    return Model(per_call, per_payload)


@contextmanager
def light_cluster(folder: Path, processes: Mapping[str, str] = SEATS) -> Iterator[tuple[Cluster, dict[str, RayWorkerGroup]]]:
    """A private Ray with one process for each slot of `processes`."""
    resolved = recipe(folder, "seats", 1, 8192, processes)
    cluster = Cluster.connect(resolved.config.cluster, new_run_id(), folder / "workers")
    try:
        plan = build_plan(resolved.config, cluster.inventory())
        light = Light(MEAN_TOKENS, tuple(name for name in METRICS if name.startswith("train/")), weight_buckets())
        yield (
            cluster,
            {
                name: cluster.launch(plan, name, f"benchmarks.light_workers:{worker}", *([] if name == "reward" else [light]))
                for name, worker in WORKERS.items()
            },
        )  # type: ignore[misc]
    finally:
        cluster.close()


def recipe(folder: Path, name: str, steps: int, samples: int, processes: Mapping[str, str]) -> Resolved:
    slots = 1 + max(int(seats.rpartition("-")[2]) for seats in processes.values())
    return load(RECIPE, [
        "cluster.num_nodes=1", f"cluster.num_gpus_per_node={slots}", "cluster.device=cpu", "cluster.threads_per_worker=1",
        f"cluster.component_placement={json.dumps(dict(processes))}", f"runner.output_dir={folder}", f"runner.experiment_name={name}",
        f"runner.max_steps={steps}", "runner.max_epochs=1000", "runner.save_interval=0", f"data.rollout_batch_size={samples // GROUP_SIZE}",
        f"algorithm.group_size={GROUP_SIZE}", "rollout.offload=false",
    ])  # fmt: skip


def weight_buckets() -> tuple[BucketSpec, ...]:
    """What a sync of the 1.5B model describes to every engine."""
    arch = read_architecture(json.loads(MODEL.read_text()))
    tensors = [(name, torch.empty(shape, dtype=torch.float16, device="meta")) for name, shape in hf_shapes(arch).items()]
    described = [layout(bucket) for bucket in group_into_buckets(tensors)]
    return tuple(BucketSpec(f"/dev/shm/rlinf-light-{i}", nbytes, specs, i) for i, (specs, nbytes) in enumerate(described))


def widened(group: RayWorkerGroup, size: int) -> Recorder:
    """A group of `size` ranks, eight a node, behind which the actors of `group` take turns."""
    turns = [rank % group.size for rank in range(size)]
    seats = [replace(group.seats[k], rank=rank, node=rank // 8) for rank, k in enumerate(turns)]
    wide = Recorder(
        group.component, seats, lambda seat: group.actors[turns[seat.rank]], [group.logs[k] for k in turns], group.failure,
        group.start_timeout, group.phase, lambda *_: None,
    )  # fmt: skip
    wide.starts = group.starts
    return wide


def prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(f"q{i:06d}", rng.integers(0, 150_000, int(rng.integers(60, 200)), dtype=np.int32), "math", ("1",)) for i in range(count)]


def measure(cluster: Cluster, workers: Mapping[str, RayWorkerGroup], folder: Path, devices: int, samples: int, steps: int) -> Load:
    """`steps` steps after one to warm up and before one whose calls are recorded, and then made again."""
    resolved = recipe(folder, f"{devices}-{samples}-{steps}", steps + 2, samples, SEATS)
    run_folder = RunFolder(resolved)
    run_folder.begin()
    groups = {name: widened(group, max(1, devices // 8) if name == "reward" else devices) for name, group in workers.items()}
    data = prompts(2 * samples // GROUP_SIZE)
    sampler = PromptSampler(len(data), samples // GROUP_SIZE, True, 0)
    megatron = MegatronGroups(groups["actor"])
    runner = ReasoningRunner(resolved.config, run_folder, cluster, megatron, groups["rollout"], groups["reward"], data, [], sampler, Stop())
    meter = Meter(run_folder.path, steps + 2, groups.values())

    async def run() -> dict[str, Calls]:
        await runner.run(meter)
        with frozen_heap():  # as in the run
            return await again(groups)

    try:
        alone = asyncio.run(cluster.guard(run()))
    finally:
        meter.close()
    calls = {name: {method: count / (steps + 2) for method, count in group.calls.items()} for name, group in groups.items()}
    cpu, wall = (np.diff(clock)[1:-1].tolist() for clock in (meter.cpu, meter.wall))
    return Load(devices, samples, cpu, wall, meter.rss[2:-1], calls, alone)


async def again(groups: Mapping[str, Recorder]) -> dict[str, Calls]:
    """Make the noted calls again, all of one kind at a time, until they are answered and their results are let go of: medians of ROUNDS."""

    def asked(group: Recorder, rank: int, method: str, args: tuple[Any, ...], returns: int) -> Ref:
        return Ref(group, rank, method, group.submit(rank, method, args, returns)[0])

    async def call(group: Recorder, one: tuple[int, str, tuple[Any, ...], int]) -> None:
        await asked(group, *one)

    found = {}
    for name, group in groups.items():
        noted, group.noted = group.noted or [], None
        for kind in dict.fromkeys(method for _, method, _, _ in noted):
            made, took = [one for one in noted if one[1] == kind], []
            for _ in range(ROUNDS):
                began = time.process_time()
                if kind in group.together:
                    await group.results([asked(group, *one) for one in made])
                else:
                    await asyncio.gather(*(call(group, one) for one in made))
                await asyncio.sleep(SETTLE)
                took.append(time.process_time() - began)
            payloads, few = sum(isinstance(a, ray.ObjectRef) for _, _, args, _ in made for a in args), made[:APART]
            began = time.process_time()
            for one in few:
                await call(group, one)
                await asyncio.sleep(GAP)
            apart = (time.process_time() - began) / len(few)
            found[f"{name}.{kind}"] = Calls(len(made), payloads, statistics.median(took), apart)
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(rss: Sequence[int]) -> float:
    """Bytes a step by which memory grows over the second half: the slope of a straight line through it."""
    half = rss[len(rss) // 2 :]
    return float(np.polyfit(range(len(half)), half, 1)[0])


def judge(model: Model, loads: Sequence[Load]) -> list[dict[str, Any]]:
    """Share of a step, of the calls by the model and as measured and of the whole driver, where there is an aim."""
    found = []
    for one in loads:
        if one.devices in AIMS:
            predicted, measured = model.seconds(one.alone), one.seconds_of_calls
            found.append({
                "devices": one.devices, "samples": one.samples, "calls": sum(calls.count for calls in one.alone.values()),
                "model_seconds": predicted, "measured_seconds": measured, "driver_seconds": one.cpu_median,
                "model_share": predicted / STEP_SECONDS, "measured_share": measured / STEP_SECONDS,
                "driver_share": one.cpu_median / STEP_SECONDS, "aim": AIMS[one.devices],
                "reached": max(predicted, measured) <= AIMS[one.devices] * STEP_SECONDS,
            })  # fmt: skip
    return found


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlinf-driver-scale-") as name, light_cluster(Path(name)) as (cluster, workers):
        loads = []
        for devices, samples in MEASURED:
            loads.append(measure(cluster, workers, Path(name), devices, samples, args.steps))
            sys.stdout.write(f"{devices} devices, {samples} samples: {loads[-1].cpu_median:.2f} CPU seconds a step\n")
        memory = measure(cluster, workers, Path(name), MEMORY_DEVICES, MEMORY_SAMPLES, args.memory_steps)
    model = fit([load for load in loads if (load.devices, load.samples) in FITTED])
    verdicts = judge(model, loads)
    result = {
        "machine": machine(),
        "step_seconds": STEP_SECONDS,
        "group_size": GROUP_SIZE,
        "mean_response_tokens": MEAN_TOKENS,
        "processes": SEATS,
        "model": asdict(model),
        "verdicts": verdicts,
        "memory": {
            "steps": args.memory_steps, "devices": MEMORY_DEVICES, "samples": MEMORY_SAMPLES, "bytes_a_step": growth(memory.rss),
            "mib_first": memory.rss[0] / 2**20, "mib_middle": memory.rss[len(memory.rss) // 2] / 2**20,
            "mib_last": memory.rss[-1] / 2**20,
        },
        "loads": [asdict(load) for load in loads],
    }  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for v in verdicts:
        sys.stdout.write(
            "{devices} devices, {samples} samples: {calls} calls {measured_share:.2%}, by the model {model_share:.2%}, aim {aim:.0%}; "
            "the whole driver {driver_share:.2%}\n".format(**v)
        )
    for kind, calls in loads[1].alone.items():
        sys.stdout.write(f"{kind}: {1000 * calls.seconds / calls.count:.2f} ms a call, {1000 * calls.apart:.2f} one by one\n")
    sys.stdout.write(f"memory: {growth(memory.rss) / 1024:.1f} KiB a step over the second half of {args.memory_steps} steps\n")


if __name__ == "__main__":
    main()
