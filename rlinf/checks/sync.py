"""`rlinf check sync`: whatever the layouts of actor and engines are, the engines run with the actor's weights.

Actors in TP x PP x DP layouts hand out the weights of one model by every transport. Engines that run another model, and have its keys and
values cached, load them. Every tensor must arrive bit-equal, the receipts must be good, the log-probabilities of probes must be the
trainer's, and what is then generated must be exactly what a fresh engine with those weights generates. fp32.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlinf.checks.rank_pool import RankPool
from rlinf.checks.tiny_model import VOCAB, write_tiny_model
from rlinf.config.schema import ActorModelConfig, OptimConfig
from rlinf.data.records import Sample
from rlinf.errors import RunFailed
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.training.engine import MegatronEngine
from rlinf.training.parallel import Coordinates
from rlinf.training.publishing import Publisher, sequence_logprobs
from rlinf.weights.architecture import open_architecture
from rlinf.weights.broadcast import Wire, open_store
from rlinf.weights.opening import open_source, release
from rlinf.weights.receipts import check_probes, check_receipts, merge_sources
from rlinf.weights.routes import (
    AUTO,
    BROADCAST,
    DEVICE_IPC,
    DISK,
    OBJECT_STORE,
    SHARED_MEMORY,
    BroadcastGroup,
    Feed,
    broadcast_groups,
    device_feeds,
    plan_feeds,
    publisher,
)
from rlinf.weights.shared_memory import land
from rlinf.weights.source import Broadcast, Buckets, Disk, Readable, Receipt, SharedMemory
from rlinf.weights.tensor_folder import open_hf_folder

RANKS = 8
REPLICAS = (1, 2)
LAYOUTS = list(product((1, 2), (1, 2), (1, 2)))  # TP, PP, DP
FAMILIES = ("qwen2", "qwen2-tied", "qwen3-moe")  # an output head of its own, one tied to the embedding, experts divided among ranks
BUCKET_BYTES = 16_000  # several buckets a stage
VERSION = 1
TRANSPORTS = (SHARED_MEMORY, OBJECT_STORE, DISK, BROADCAST, DEVICE_IPC)
HOST = "127.0.0.1"
TIMEOUT = 60.0  # seconds that the members of a broadcast group wait for each other
COMPLAINTS = 5


@dataclass(frozen=True)
class Case:
    """One way of weights from the actor to the engines."""

    family: str
    tp: int
    pp: int
    dp: int
    transport: str
    replicas: int

    def label(self) -> str:
        return f"{self.family} TP{self.tp} PP{self.pp} DP{self.dp} -> {self.replicas} engine(s) by {self.transport}"


@dataclass(frozen=True)
class Handed:
    """What one rank handed out: sources by transport, broadcasts by the number of engines; arrays for the object store; its
    log-probabilities of the probes (last stage)."""

    sources: dict[str, Readable]
    broadcasts: dict[int, Buckets]
    arrays: tuple[np.ndarray, ...]
    scores: list[np.ndarray]


@dataclass(frozen=True)
class Meeting:
    """The store where broadcast groups meet on this machine, a name for them, and the groups for each number of engines."""

    port: int
    name: str
    groups: dict[int, tuple[BroadcastGroup, ...]]


@dataclass(frozen=True)
class Finding:
    """fault: what is wrong, empty when nothing is. gap: the largest difference of log-probabilities on the probes."""

    case: Case
    gap: float
    fault: str
    seconds: float


@dataclass(frozen=True)
class Models:
    """The folders of one family: the model that engines run before, and the actor's model; and what a fresh engine generates with the
    latter."""

    before: Path
    after: Path
    generated: list[Sample]


def make_cases(quick: bool = False) -> list[Case]:
    """Every layout with all families, all transports, and 1 and 2 engines. quick: every layout once."""
    cases = [Case(f, *layout, t, r) for layout in LAYOUTS for f in FAMILIES for t in TRANSPORTS for r in REPLICAS]
    each = len(cases) // len(LAYOUTS)
    return [cases[each * i + 3 * i % each] for i in range(len(LAYOUTS))] if quick else cases


def hand_out_weights(
    at: Coordinates, folder: str, run_id: str, transports: tuple[str, ...], files: str, meeting: Meeting, probes: list[np.ndarray]
) -> Handed:
    """Runs in every rank: hand out the weights by each transport, and over the groups of `meeting`."""
    arch = open_architecture(folder)
    engine = MegatronEngine(arch, ActorModelConfig(at.tp, at.pp, precision="fp32"), OptimConfig(), at, torch.device("cpu"))
    engine.load_hf(open_hf_folder(folder))
    publisher = Publisher(engine, run_id, Path(files), BUCKET_BYTES)
    handed = publisher.hand_out(VERSION, transports)
    sources = {t: source for t, source in handed.sources.items() if not isinstance(source, Broadcast)}  # that is for servers alone
    broadcasts: dict[int, Buckets] = {}
    for engines, groups in meeting.groups.items():
        mine = [g for g in groups if g.replica == at.dp_rank and g.stage == at.pp_rank]
        if mine and at.tp_rank == 0:
            store = dist.PrefixStore(f"{meeting.name}-{engines}", open_store(HOST, meeting.port, keeps=False))
            publisher.wire = Wire(mine[0], mine[0].members[0], store, engine.device, TIMEOUT)
        broadcasts |= {engines: source for source in publisher.hand_out(VERSION, (BROADCAST,) if mine else ()).sources.values()}
    return Handed(sources, broadcasts, handed.arrays, sequence_logprobs(engine, probes))


def receive(meeting: Meeting, engines: int, rank: int) -> SharedMemory:
    """Receive what comes to one engine over its groups, stage after stage; runs in a thread of its own."""
    store = dist.PrefixStore(f"{meeting.name}-{engines}", open_store(HOST, meeting.port, keeps=False))
    mine = [g for g in meeting.groups[engines] if rank in g.engines]
    wires = [Wire(group, f"rollout rank {rank}", store, torch.device("cpu"), TIMEOUT) for group in mine]
    return merge_sources([wire.receive(f"{meeting.name}-{engines}-r{rank}", VERSION)[0] for wire in wires])


def feeds_of(case: Case) -> tuple[Feed, ...]:
    """The feeds of a case: each replica of the actor on a node of its own, engines on the same nodes by turns, and for the object store on
    a node of their own."""
    if case.transport == DEVICE_IPC:  # a replica and the engines that it feeds have all their devices in common
        devices = [[(d, stage) for stage in range(case.pp)] for d in range(case.dp)]
        feeds = device_feeds(devices, [devices[k % case.dp] for k in range(case.replicas)])
        assert feeds is not None
        return feeds
    away = case.transport == OBJECT_STORE
    engines = [case.dp if away else k % case.dp for k in range(case.replicas)]
    return plan_feeds([[d] * case.pp for d in range(case.dp)], engines, case.transport if case.transport in (DISK, BROADCAST) else AUTO)


def check_cases(pool: RankPool, cases: Sequence[Case], folder: Path, make_engine: Callable[[Path], EmbeddedEngine]) -> Iterator[Finding]:
    """Run the cases, with models written to `folder`. Cases with the same actor are handed out together."""
    probes = [np.random.default_rng(i).integers(1, VOCAB, 12 + i).astype(np.int32) for i in range(4)]
    models = {family: make_models(folder, family, make_engine) for family in {c.family for c in cases}}
    engines = {(family, k): make_engine(m.before) for family, m in models.items() for k in range(max(REPLICAS))}
    store = open_store(HOST, 0, keeps=True)
    for i, (_, same) in enumerate(groupby(cases, key=lambda c: (c.family, c.tp, c.pp, c.dp))):
        alike = list(same)
        streams = {c.replicas: broadcast_groups(feeds_of(c), c.tp, c.pp, c.dp) for c in alike if c.transport == BROADCAST}
        meeting = Meeting(store.port, f"check-{os.getpid()}-{i}", streams)
        with ExitStack() as undo:
            started = time.perf_counter()
            handed, received = hand_out_all(pool, alike, models[alike[0].family].after, folder / "files", meeting, probes)
            for source in (*received.values(), *(s for part in handed for s in part.sources.values())):
                undo.callback(release, source)
            for case in alike:
                own, taking = models[case.family], [engines[case.family, k] for k in range(case.replicas)]
                gap, fault = asyncio.run(take(case, handed, received, own, taking, probes, meeting.name))
                yield Finding(case, gap, fault, time.perf_counter() - started)
                started = time.perf_counter()
    for engine in engines.values():
        engine.close()


def hand_out_all(
    pool: RankPool, alike: Sequence[Case], model: Path, files: Path, meeting: Meeting, probes: list[np.ndarray]
) -> tuple[list[Handed], dict[tuple[int, int], SharedMemory]]:
    """What each rank handed out for these cases, which differ in transport and engines; and what came by broadcast, by (engines,
    engine)."""
    first, transports = alike[0], tuple({c.transport: None for c in alike if c.transport != BROADCAST})
    with ThreadPoolExecutor(1 + max(REPLICAS)) as threads:
        handing = threads.submit(
            pool.run, hand_out_weights, str(model), meeting.name, transports, str(files), meeting, probes,
            ranks=first.tp * first.pp * first.dp, tp=first.tp, pp=first.pp,
        )  # fmt: skip
        received: dict[tuple[int, int], SharedMemory] = {}
        for n in meeting.groups:
            coming = [threads.submit(receive, meeting, n, k) for k in range(n)]
            received |= {(n, k): one.result() for k, one in enumerate(coming)}
        return handing.result(), received


async def take(
    case: Case, handed: Sequence[Handed], received: Mapping[tuple[int, int], SharedMemory], models: Models,
    engines: Sequence[EmbeddedEngine], probes: Sequence[np.ndarray], name: str,
) -> tuple[float, str]:  # fmt: skip
    """Load what was handed out into the engines. Returns (gap of the probes, what is wrong)."""
    for engine in engines:  # another model's weights, and its keys and values in the cache
        await engine.load_weights(Disk(str(models.before)), 0)
        await generate(engine)
    receipts: list[Receipt] = []
    sources: list[Readable] = []
    try:
        for k, (engine, feed) in enumerate(zip(engines, feeds_of(case))):
            stages = [handed[publisher(feed.replica, stage, case.tp, case.dp)] for stage in range(case.pp)]
            source: Readable
            if feed.transport == BROADCAST:
                source = as_received(merge_sources([s.broadcasts[case.replicas] for s in stages]), received[case.replicas, k])
            else:
                source = merge_sources([s.sources[case.transport] for s in stages])
            if feed.transport == OBJECT_STORE:
                assert isinstance(source, SharedMemory)  # so the publisher describes what the object store carries
                source = land(source, [a for stage in stages for a in stage.arrays], f"{name}-r{k}", VERSION)
            sources.append(source)
            receipts.append(await engine.load_weights(source, VERSION))
        check_receipts(sources, VERSION, receipts)
        wrong = [different(source, models.after) for source in sources]
        trainer = next(h.scores for h in handed if h.scores)
        gap = check_probes(VERSION, "fp32", trainer, [await engine.sequence_logprobs(probes) for engine in engines])
    except RunFailed as error:
        return float("nan"), str(error)
    finally:
        if case.transport == OBJECT_STORE:  # of these each engine had its own
            for source in sources:
                release(source)
    if any(wrong):
        return gap, f"tensor {next(filter(None, wrong))} is not what was sent"
    for engine in engines:
        if not all(same(a, b) for a, b in zip(await generate(engine), models.generated, strict=True)):
            return gap, "the engine does not generate what a fresh engine on these weights does: something of the old ones is left"
    return gap, ""


def as_received(sent: Buckets, landed: SharedMemory) -> SharedMemory:
    """The buckets that were sent, in the place where they have arrived; fewer if fewer arrived."""
    return SharedMemory(tuple(replace(bucket, key=here.key) for bucket, here in zip(sent.buckets, landed.buckets)))


def different(source: Readable, folder: Path) -> str:
    """The first tensor that is missing, unknown, or not bit-equal to the one in the folder; empty when all are equal."""
    want = dict(open_hf_folder(folder).items())
    got = dict(open_source(source))
    missing = sorted(want.keys() ^ got.keys())
    return missing[0] if missing else next((name for name in want if not torch.equal(want[name], got[name])), "")


def make_models(folder: Path, family: str, make_engine: Callable[[Path], EmbeddedEngine]) -> Models:
    before, after = (write_tiny_model(folder / f"{family}-{seed}", family, seed) for seed in (0, 1))
    for model in (before, after):
        (model / "tokenizer.json").write_text("{}")  # an engine asks that there is one; nothing here reads it
    fresh = make_engine(after)
    generated = asyncio.run(generate(fresh))
    fresh.close()
    return Models(before, after, generated)


async def generate(engine: EmbeddedEngine) -> list[Sample]:
    """Generate greedy samples of one prompt, whose keys and values the engine then has in its cache."""
    prompt = np.arange(1, 40, dtype=np.int32)
    request = GenerateRequest("probe", prompt, 2, SamplingParams(temperature=0), Stop(), 16)
    return sorted([s async for s in engine.generate(request)], key=lambda s: s.sample_id)


def same(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.rollout_logprobs, b.rollout_logprobs)


def small_engine(folder: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(folder), dtype="fp32", slots=4, max_context=96, seed=7)


def table(findings: Sequence[Finding]) -> Table:
    out = Table(title="The actor's weights in the engines, from every layout (fp32)", title_justify="left")
    for name in ("family", "TP", "PP", "DP", "transport", "engines", "probe gap", "s", ""):
        out.add_column(name, justify="left" if name in ("family", "transport") else "right", no_wrap=True)
    for v in findings:
        c = v.case
        words = (
            c.family,
            c.tp,
            c.pp,
            c.dp,
            c.transport,
            c.replicas,
            f"{v.gap:.0e}",
            f"{v.seconds:.1f}",
            "[red]FAILS[/]" if v.fault else "ok",
        )
        out.add_row(*map(str, words))
    return out


def main(quick: bool, json_file: Path | None) -> int:
    """The command. Exit code 0 when every case holds, else 1."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 140)
    cases = make_cases(quick)
    with RankPool(RANKS) as pool, tempfile.TemporaryDirectory(prefix="rlinf-sync-") as folder:
        pool.start()
        work = check_cases(pool, cases, Path(folder), small_engine)
        findings = list(track(work, "ways", len(cases), console=Console(stderr=True), transient=True))
    seconds = time.perf_counter() - started
    failing = [v for v in findings if v.fault]
    console.print(table(findings))
    for v in failing[:COMPLAINTS]:
        console.print(f"{v.case.label()}: {v.fault}", style="red", highlight=False)
    console.print(f"{len(findings) - len(failing)} of {len(findings)} ways hold; {seconds:.0f} s", highlight=False)
    if json_file:
        json_file.write_text(json.dumps(report(findings, seconds), indent=1) + "\n")
    return 1 if failing else 0


def report(findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    return {
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__},
        "seconds": seconds,
        "holds": not any(v.fault for v in findings),
        "ways": [asdict(v) for v in findings],
    }
