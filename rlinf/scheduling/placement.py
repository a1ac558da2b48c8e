"""Decides on which devices every rank lives: from configuration and node inventory to a Plan. Pure functions."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlinf.config.schema import MEGATRON_ROLES, ActorModelConfig, ClusterConfig, Config
from rlinf.errors import UserError
from rlinf.weights.routes import BROADCAST, DEVICE_IPC, DISK, DeviceAddress, Feed, device_feeds, publisher

KEY = "cluster.component_placement"
COMPONENTS = (*MEGATRON_ROLES, "rollout", "reward")
PROFILED = ("actor", "critic", "rollout")
PART = "rollout_part"  # seats of engines that span nodes, on all of their nodes but the first


@dataclass(frozen=True)
class Node:
    """A machine of the run: its rank among the nodes, and the number of its devices (GPUs, or process slots on a CPU machine)."""

    rank: int
    devices: int


@dataclass(frozen=True)
class Seat:
    """One process of the run, and the devices that it uses on one node."""

    component: str
    rank: int
    node: int
    devices: tuple[int, ...]

    @property
    def places(self) -> list[DeviceAddress]:
        return [(self.node, index) for index in self.devices]


@dataclass(frozen=True)
class Plan:
    """All seats, ordered by component, then rank.

    mode: how components share devices (collocated, disaggregated, hybrid), or what the run is (evaluation, supervised).
    transport: how weights go from the actor to the engines (rollout.weight_transport); None where there are no weights to send, or where it
    is not known yet.
    """

    seats: tuple[Seat, ...]
    mode: str
    transport: str | None = None

    def of(self, component: str) -> tuple[Seat, ...]:
        return tuple(s for s in self.seats if s.component == component)

    def places(self, component: str) -> set[DeviceAddress]:
        """The devices of a component. Those of the engines are on all of the nodes that they span."""
        parts = self.of(PART) if component == "rollout" else ()
        return {place for s in (*self.of(component), *parts) for place in s.places}

    def shares_device(self, a: str, b: str) -> bool:
        return not self.places(a).isdisjoint(self.places(b))


@dataclass(frozen=True)
class WorkerAddress:
    """What a worker knows about its place before its constructor runs. rank and world_size: within its component. devices: on its node."""

    component: str
    rank: int
    world_size: int
    node: int
    devices: tuple[int, ...]
    master_addr: str
    master_port: int
    run_id: str
    threads: int
    host: str = "127.0.0.1"  # of this worker's node, for peers


def nodes_of(cluster: ClusterConfig) -> list[Node]:
    """The nodes that the configuration asks for. Whether they are there is checked by rlinf.cluster."""
    return [Node(rank, cluster.num_gpus_per_node) for rank in range(cluster.num_nodes)]


def build_plan(config: Config, nodes: Sequence[Node]) -> Plan:
    """Seat every rank. Raises UserError that names the key and the nearest remedy for a placement that is not possible.

    Devices are numbered node by node. Actor ranks and engines each have their devices to themselves within their component; whether
    different components share devices is said by `cluster.component_placement`. Actor ranks follow Megatron's order: tensor-parallel index
    fastest, then context-parallel, then data-parallel, pipeline stage slowest. Reward has one process on each of its nodes, on the first of
    its devices there.
    """
    devices = _component_devices(config.cluster.component_placement, nodes, [c for c in COMPONENTS if config.has(c)])
    seats = [
        *(seat for c in config.megatron_roles for seat in _megatron_seats(c, getattr(config, c).model, devices[c])),
        *_rollout_seats(config.rollout.tensor_parallel_size, devices["rollout"]),
        *_reward_seats(devices["reward"]),
    ]
    if any(s.component == PART for s in seats):
        _check_spanning(config, weights_are_sent=True)
    if config.cluster.backend == "local" and any(s.rank for s in seats):
        counts = ", ".join(f"{c} {sum(s.component == c for s in seats)}" for c in COMPONENTS if c in devices)
        raise UserError(
            f"cluster.backend: local runs everything in one process, one rank a component, but the placement has {counts}; "
            "use cluster.backend: ray, or num_nodes: 1, num_gpus_per_node: 1 with tensor, context and pipeline parallel sizes 1"
        )
    actor, rollout = set(devices["actor"]), set(devices["rollout"])
    mode = "collocated" if actor == rollout else "hybrid" if actor & rollout else "disaggregated"
    if mode != "disaggregated" and config.algorithm.max_staleness and not config.rollout.partial and config.cluster.device != "cpu":
        raise UserError(
            f"algorithm.max_staleness: {config.algorithm.max_staleness} lets engines generate while the actor trains, but they share "
            "devices: give them devices of their own in cluster.component_placement, or set algorithm.schedule: wallclock and "
            "rollout.partial: true (slots of a CPU machine may be shared: cluster.device: cpu)"
        )
    if mode != "disaggregated" and config.rollout.weight_transport == "broadcast" and config.cluster.device != "cpu":
        raise UserError(
            "rollout.weight_transport: broadcast puts actor and engines into one NCCL group, which takes one member a device, but they "
            "share devices in cluster.component_placement: use auto or disk, or give them devices of their own "
            "(slots of a CPU machine may be shared: cluster.device: cpu)"
        )
    if config.rollout.offload and mode == "disaggregated":
        raise UserError(
            "rollout.offload: engines and actor share no device in cluster.component_placement, and nobody needs the memory; "
            "set it to false"
        )
    _check_profiled(config, seats)
    plan = Plan(tuple(seats), mode, config.rollout.weight_transport)
    if config.rollout.weight_transport == DEVICE_IPC and feeds_on_devices(config, plan.of("actor"), plan.of("rollout")) is None:
        raise UserError(
            "rollout.weight_transport: device_ipc hands weights over on a device that is the engine's own, but some engine does "
            "not have all devices from which a replica of the actor publishes (the first of each tensor-parallel group, in every "
            f"stage); change {KEY} or the parallel sizes, or use auto"
        )
    return plan


def feeds_on_devices(config: Config, actor: Sequence[Seat], rollout: Sequence[Seat]) -> tuple[Feed, ...] | None:
    """The feeds when every engine can read all its weights on its own devices; None when one cannot."""
    devices = [[actor[rank].places[0] for rank in stages] for stages in publishers(config.actor.model, len(actor))]
    return device_feeds(devices, [engine.places for engine in rollout])


def publishers(model: ActorModelConfig, ranks: int) -> list[list[int]]:
    """publishers[d][p] is the rank that represents pipeline stage p of data-parallel rank d: it publishes the stage's weights, and on the
    last stage it returns the numbers of tokens."""
    dp, pp = model.data_parallel_size(ranks), model.pipeline_model_parallel_size
    return [[publisher(replica, stage, model.stage_ranks, dp) for stage in range(pp)] for replica in range(dp)]


def build_evaluation_plan(config: Config, nodes: Sequence[Node]) -> Plan:
    """Engines on every device, one reward process on each node, no actor. cluster.component_placement is not used."""
    devices = [(n.rank, i) for n in nodes for i in range(n.devices)]
    seats = _rollout_seats(config.rollout.tensor_parallel_size, devices)
    if any(s.component == PART for s in seats):
        _check_spanning(config, weights_are_sent=False)
    return Plan((*seats, *_reward_seats(devices)), "evaluation")


def build_sft_plan(config: Config, nodes: Sequence[Node]) -> Plan:
    """Only the actor, on its devices in cluster.component_placement."""
    devices = _component_devices(config.cluster.component_placement, nodes, ("actor",))["actor"]
    seats = _megatron_seats("actor", config.actor.model, devices)
    if config.cluster.backend == "local" and len(seats) > 1:
        raise UserError(f"cluster.backend: local is one process, but the actor has {len(seats)} devices; use cluster.backend: ray")
    _check_profiled(config, seats)
    return Plan(tuple(seats), "supervised")


def describe(plan: Plan, config: Config) -> str:
    """The plan as text: how components share devices, the Megatron layouts, and what is on every node."""
    rollout = config.rollout
    lines = [f"placement: {plan.mode}, {len({s.node for s in plan.seats})} node(s)"]
    lines += [_layout(c, getattr(config, c).model, plan.of(c)) for c in MEGATRON_ROLES if plan.of(c)]
    if plan.of("rollout"):
        lines += [
            f"  rollout  {len(plan.of('rollout'))} {rollout.rollout_backend} engine(s) of {rollout.tensor_parallel_size} device(s)",
            f"  reward   {len(plan.of('reward'))} process(es) on the hosts",
        ]
    for node in sorted({s.node for s in plan.seats}):
        seated = {c: [s for s in plan.of(c) if s.node == node] for c in (*COMPONENTS, PART)}
        parts = [
            f"{c} {_ranges([s.rank for s in seats])} on {_ranges(sorted(d for s in seats for d in s.devices))}"
            for c, seats in seated.items()
            if seats
        ]
        lines.append(f"  node {node:<3} " + " | ".join(parts))
    return "\n".join(lines)


def _layout(component: str, model: ActorModelConfig, seats: Sequence[Seat]) -> str:
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    crossing = sum(len({s.node for s in seats[i : i + tp]}) > 1 for i in range(0, len(seats), tp))
    slow = f"; {crossing} TP group(s) cross nodes (slow)" if crossing else ""
    context = f"CP {cp} x " if cp > 1 else ""
    return f"  {component:<8} {len(seats)} rank(s) = TP {tp} x {context}DP {model.data_parallel_size(len(seats))} x PP {pp}{slow}"


def _component_devices(placement: Mapping[str, str], nodes: Sequence[Node], needed: Sequence[str]) -> dict[str, list[DeviceAddress]]:
    everything = [(n.rank, i) for n in nodes for i in range(n.devices)]
    devices: dict[str, list[DeviceAddress]] = {}
    for names, spec in placement.items():
        for name in (n.strip() for n in names.split(",")):
            if name not in COMPONENTS:
                close = difflib.get_close_matches(name, COMPONENTS, n=1)
                hint = (
                    "the actor recomputes log-probabilities itself; remove it"
                    if name == "inference"
                    else f"components are {', '.join(COMPONENTS)}"
                )
                raise UserError(f"{KEY}: unknown component {name!r}; " + (f"did you mean {close[0]}?" if close else hint))
            if name in devices:
                raise UserError(f"{KEY}: {name} is placed twice; give it one list of devices, such as `{name}: 0-3,8`")
            devices[name] = [everything[i] for i in _indices(name, spec, len(everything))]
    missing = [c for c in needed if c not in devices]
    if missing:
        raise UserError(f"{KEY}: {', '.join(missing)} has no devices; add it, such as `{','.join(missing)}: all`")
    return devices


def _indices(name: str, spec: str, available: int) -> list[int]:
    """`all`, `0-7`, `0-3,8` -> device numbers in ascending order."""
    if spec.strip() == "all":
        return list(range(available))
    found: list[int] = []
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UserError(f"{KEY}: {name}: cannot read {spec!r}; write `all`, a range `0-7`, or a list `0-3,8`")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UserError(f"{KEY}: {name}: the range {part.strip()} runs backwards; write {last}-{first}")
        if last >= available:
            raise UserError(
                f"{KEY}: {name}: device {last} does not exist; there are {available} devices, 0-{available - 1} "
                "(cluster.num_nodes x cluster.num_gpus_per_node); name those, or raise one of the two"
            )
        found += range(first, last + 1)
    twice = sorted({i for i in found if found.count(i) > 1})
    if twice:
        raise UserError(f"{KEY}: {name}: device {twice[0]} is listed twice in {spec!r}; list it once")
    return sorted(found)


def _megatron_seats(component: str, model: ActorModelConfig, devices: Sequence[DeviceAddress]) -> list[Seat]:
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size", *["context_parallel_size"] * (model.context_parallel_size > 1)]
    sizes, least = " x ".join(f"{component}.model.{name} {getattr(model, name)}" for name in names), model.copy_ranks
    if len(devices) < least:
        raise UserError(
            f"{KEY}: the {component} needs at least {least} devices ({sizes}), but it has {len(devices)}; give it more devices "
            "(on a CPU machine raise cluster.num_gpus_per_node), or lower the parallel sizes"
        )
    if len(devices) % least:
        fewer = len(devices) // least * least
        raise UserError(
            f"{KEY}: the {component} has {len(devices)} devices, which {sizes} = {least} does not divide; "
            f"give it {fewer} or {fewer + least} devices"
        )
    groups = _groups(devices, model.tensor_model_parallel_size)
    return [Seat(component, rank, device[0], (device[1],)) for rank, device in enumerate(d for group in groups for d in group)]


def _rollout_seats(tp: int, devices: Sequence[DeviceAddress]) -> list[Seat]:
    key = "rollout.tensor_parallel_size"
    if len(devices) % tp:
        sizes = [t for t in range(1, len(devices) + 1) if len(devices) % t == 0]
        raise UserError(
            f"{key}: engines of {tp} devices do not fit the rollout's {len(devices)} devices; change it to one of {sizes}, "
            f"or change the rollout's devices in {KEY}"
        )
    per_node = Counter(node for node, _ in devices)
    if tp > max(per_node.values()) and len({*per_node.values()}) == 1 and tp % per_node[devices[0][0]] == 0:
        return _spanning_seats(tp // per_node[devices[0][0]], devices)
    groups = _groups(devices, tp)
    crossing = next((g for g in groups if g[0][0] != g[-1][0]), None)
    if crossing:
        raise UserError(
            f"{key}: an engine of {tp} devices stays inside one node, or has all of the rollout's devices on each of its nodes, as many "
            f"everywhere; the rollout has {', '.join(f'{n} on node {node}' for node, n in sorted(per_node.items()))}; "
            f"give it a multiple of {tp} devices on every node in {KEY}, or lower {key}"
        )
    return [Seat("rollout", rank, group[0][0], tuple(i for _, i in group)) for rank, group in enumerate(groups)]


def _spanning_seats(span: int, devices: Sequence[DeviceAddress]) -> list[Seat]:
    """Seats of engines that span `span` consecutive nodes each; the first node serves."""
    by_node = [(node, tuple(i for _, i in found)) for node, found in itertools.groupby(devices, key=lambda d: d[0])]
    first = [Seat("rollout", rank, *by_node[rank * span]) for rank in range(len(by_node) // span)]
    others = [place for i, place in enumerate(by_node) if i % span]
    return first + [Seat(PART, rank, *place) for rank, place in enumerate(others)]


def _check_spanning(config: Config, weights_are_sent: bool) -> None:
    """Raise UserError for settings that an engine which spans nodes does not support."""
    what = f"rollout.tensor_parallel_size: engines of {config.rollout.tensor_parallel_size} devices span nodes"
    if config.rollout.rollout_backend != "sglang":
        raise UserError(f"{what}, which only rollout.rollout_backend: sglang does")
    if weights_are_sent and config.rollout.weight_transport not in (DISK, BROADCAST):
        raise UserError(
            f"{what}, and each reads weights that all of them see: set rollout.weight_transport to disk or broadcast, "
            f"not {config.rollout.weight_transport}"
        )
    if config.rollout.max_engine_restarts:
        raise UserError(f"{what}, and one that dies is not started anew: set rollout.max_engine_restarts to 0")


def _check_profiled(config: Config, seats: Sequence[Seat]) -> None:
    """Raise UserError when a rank is to be profiled that no role has."""
    runner, sizes = config.runner, {c: sum(s.component == c for s in seats) for c in PROFILED}
    beyond = [rank for rank in runner.profile_ranks if not 0 <= rank < max(sizes.values())]
    if beyond and runner.profile_steps:
        there = ", ".join(f"{c} {_ranges(range(n))}" for c, n in sizes.items() if n)
        raise UserError(f"runner.profile_ranks: no role has rank {beyond[0]}; there are {there}; name some of those")


def _reward_seats(devices: Sequence[DeviceAddress]) -> list[Seat]:
    first = {node: index for node, index in reversed(devices)}
    return [Seat("reward", rank, node, (first[node],)) for rank, node in enumerate(sorted(first))]


def _groups(devices: Sequence[DeviceAddress], size: int) -> list[list[DeviceAddress]]:
    """Consecutive devices in groups of `size`, as many groups as possible within one node, in the order of their first device."""
    groups, left = [], []
    for _, on_node in itertools.groupby(devices, key=lambda d: d[0]):
        found = list(on_node)
        whole = len(found) // size * size
        groups += [found[i : i + size] for i in range(0, whole, size)]
        left += found[whole:]
    return sorted(groups + [left[i : i + size] for i in range(0, len(left), size)])


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
