"""`rlinf plan`: shows which component is on which device, what each device must hold, how long a step should take, and what to change if it
does not fit."""

from __future__ import annotations

import copy
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlinf.checks.preflight import check_models
from rlinf.config.load import Resolved, value_of
from rlinf.config.model import MLP_MATRICES, planned_model_config, validate_model
from rlinf.config.schema import LORA_TARGETS, Config
from rlinf.config.validate import validate
from rlinf.config.values import dump
from rlinf.errors import UserError
from rlinf.scheduling.devices import GIB, GPUS, Device, cpu_device
from rlinf.scheduling.flops import recomputed_layers
from rlinf.scheduling.memory import EngineMemory, RankMemory, engine_memory, rank_memory
from rlinf.scheduling.placement import PART, Plan, Seat, build_plan, describe, nodes_of
from rlinf.scheduling.step_time import MEAN_SHARE, Load, role_seconds, rollout_seconds, step_load, sync_seconds
from rlinf.weights.architecture import Architecture, read_architecture

RESERVE = 0.06  # of a GPU's memory: fragments, workspaces of libraries
SGLANG_WORKSPACE = 2 * GIB  # CUDA graphs and activations, outside rollout.gpu_memory_utilization
SGLANG_PROCESSES = 3  # of a server: front, scheduler, detokenizer
BUCKETS = 256 << 20  # weights on the way
Change = dict[str, Any]
Ranks = Mapping[str, tuple[RankMemory, ...]]  # Megatron role -> a rank of each of its pipeline stages
Models = Mapping[str, Architecture]  # Megatron role -> its model, where that is not the actor's


@dataclass(frozen=True)
class Forecast:
    """The figures of one configuration on one kind of device.

    phases: bytes on the fullest device, `training` by whichever role needs most. host: bytes that ranks of the fullest node keep in host
    memory besides, 0 where that is the device. trouble: what does not fit; empty when all fits.
    """

    placement: Plan
    load: Load
    ranks: Ranks
    engine: EngineMemory
    kv_tokens: int
    phases: dict[str, int]
    host: int
    limit: int
    seconds: dict[str, float]
    trouble: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def forecast(
    config: Config, arch: Architecture, device: Device, mean_response: int | None = None, others: Models | None = None
) -> Forecast:
    """Compute the figures. It is pure and quick, since the search for a configuration that fits tries hundreds.

    arch: the actor's model, and that of every role that `others` does not name.
    """
    placement = build_plan(config, nodes_of(config.cluster))
    archs = {role: (others or {}).get(role, arch) for role in config.megatron_roles}
    ranks = {role: _stages(archs[role], config, role, placement, device) for role in archs}
    engines = placement.of("rollout")
    engine, load = engine_memory(arch, config, gpu=not device.shared), step_load(config, mean_response)
    phases = (_host_phases if device.shared else _gpu_phases)(config, placement, device, ranks, engine)
    limit = int(device.memory * (1 - RESERVE))
    kv_tokens = engine.tokens
    if not device.shared:
        kv_tokens = max(0, int(config.rollout.gpu_memory_utilization * device.memory) - engine.weights) // engine.kv_token
    moved = 0 if device.shared else sum(_moved(config, role, fullest(ranks[role])) for role in archs if _takes_turns(placement, role))
    across = {s.node for s in placement.of("actor")} != {s.node for s in engines}
    seconds = {"rollout": rollout_seconds(arch, config, device, engine, len(engines), max(kv_tokens, 1), load)}
    for role in reversed(archs):  # in the order of a step: token rewards, values, the actor
        seconds |= role_seconds(archs[role], config, role, device, len(placement.of(role)), load)
    seconds["weights"] = sync_seconds(arch, config, device, moved, across)
    host = 0 if device.shared else _host_memory(config, placement, ranks)
    trouble = _trouble(phases, limit, kv_tokens, engine, device)
    return Forecast(placement, load, ranks, engine, kv_tokens, phases, host, limit, seconds, trouble)


def _stages(arch: Architecture, config: Config, role: str, plan: Plan, device: Device) -> tuple[RankMemory, ...]:
    model = getattr(config, role).model
    dp, stages = model.data_parallel_size(len(plan.of(role))), range(model.pipeline_model_parallel_size)
    return tuple(rank_memory(arch, config, role, dp, stage, gpu=not device.shared) for stage in stages)


def _rank_at(plan: Plan, ranks: Ranks, seat: Seat) -> RankMemory:
    stages = ranks[seat.component]
    return stages[seat.rank // (len(plan.of(seat.component)) // len(stages))]


def fullest(stages: tuple[RankMemory, ...]) -> RankMemory:
    return max(stages, key=lambda s: s.total)


def _takes_turns(plan: Plan, role: str) -> bool:
    """Whether the role shares devices with engines or with the actor."""
    return plan.shares_device(role, "rollout") or (role != "actor" and plan.shares_device(role, "actor"))


def _moved(config: Config, role: str, rank: RankMemory) -> int:
    """Bytes of a rank that leave the device once a step, and come back. Gradients are freed."""
    section = getattr(config, role)
    return rank.weights * section.offload_weight + rank.optimizer * getattr(section, "offload_optimizer", False)


def _host_memory(config: Config, plan: Plan, ranks: Ranks) -> int:
    """Bytes in host memory on the fullest node: what is off the GPUs, and the weights of a reference policy."""
    found = dict.fromkeys((s.node for s in plan.seats), 0)
    for role in ranks:
        for seat in plan.of(role):
            rank = _rank_at(plan, ranks, seat)
            copied = role == "actor" and config.algorithm.kl_beta and not config.actor.lora.rank  # the reference policy
            found[seat.node] += _moved(config, role, rank) + (rank.weights if copied else 0)
    return max(found.values())


def _left_on_device(config: Config, role: str, rank: RankMemory) -> int:
    """Bytes that a rank leaves on its device while others are at work there."""
    return rank.held - _moved(config, role, rank) - rank.gradients * getattr(getattr(config, role), "offload_grad", False)


def _gpu_phases(config: Config, plan: Plan, device: Device, ranks: Ranks, engine: EngineMemory) -> dict[str, int]:
    """Bytes on the fullest GPU while training, while weights move and while generating.

    Engines that share it keep what they have, unless they sleep while it trains (rollout.offload).
    """
    sglang = config.rollout.rollout_backend == "sglang"
    serving = device.context + (SGLANG_WORKSPACE if sglang else 0)
    held = int(config.rollout.gpu_memory_utilization * device.memory) if sglang else engine.weights + engine.kv_token * engine.tokens
    asleep, woken = (serving, engine.weights + serving) if config.rollout.offload else (held + serving, held + serving)
    found = {"training": 0, "weights": 0, "rollout": 0}
    for rank, generates in _gpus(plan, ranks):
        resting = {role: _left_on_device(config, role, r) + device.context for role, r in rank.items()}
        left = sum(resting.values())
        published = rank["actor"].weights if "actor" in rank and config.actor.offload_weight else 0  # there until engines have them
        at_work = [
            left - resting[role] + r.total + device.context + (published if role == "critic" else 0) + (asleep if generates else 0)
            for role, r in rank.items()
        ]
        now = {"training": max(at_work, default=0)}
        if generates:
            now |= {"weights": left + published + woken + BUCKETS, "rollout": left + held + serving}
        found = {phase: max(size, now.get(phase, 0)) for phase, size in found.items()}
    return found


def _gpus(plan: Plan, ranks: Ranks) -> list[tuple[dict[str, RankMemory], bool]]:
    """Of each GPU: the rank of each Megatron role on it, and whether an engine is on it. GPUs with the same on them are named once."""
    on: dict[tuple[int, int], dict[str, RankMemory | None]] = {}
    for seat in plan.seats:
        for index in seat.devices:
            on.setdefault((seat.node, index), {})[seat.component] = _rank_at(plan, ranks, seat) if seat.component in ranks else None
    different = {frozenset(there.items()) for there in on.values()}
    return [({c: r for c, r in there if r is not None}, any(c in ("rollout", PART) for c, _ in there)) for there in different]


def _host_phases(config: Config, plan: Plan, device: Device, ranks: Ranks, engine: EngineMemory) -> dict[str, int]:
    """Bytes in the memory of the fullest CPU node, which all its processes share. Only gradients are ever freed."""
    server = SGLANG_PROCESSES * device.context if config.rollout.rollout_backend == "sglang" else 0
    held = engine.weights + engine.kv_token * engine.tokens + server
    found = {"training": 0, "weights": 0, "rollout": 0}
    for node in {s.node for s in plan.seats}:
        processes = sum(s.node == node for s in plan.seats) * device.context
        resting = processes + sum(s.node == node for s in plan.of("rollout")) * held
        at_work = [0]
        for role in ranks:
            mine = [_rank_at(plan, ranks, s) for s in plan.of(role) if s.node == node]
            gradients = sum(r.gradients for r in mine) * getattr(getattr(config, role), "offload_grad", False)
            resting += sum(r.held for r in mine) - gradients
            at_work.append(sum(r.total - r.held for r in mine) + gradients)
        actors = any(s.node == node for s in plan.of("actor"))
        sent = sum(a.weights for a in ranks["actor"]) * config.actor.model.tensor_model_parallel_size if actors else 0
        now = {"training": resting + max(at_work), "weights": resting + sent, "rollout": resting}
        found = {phase: max(found[phase], now[phase]) for phase in found}
    return found


def _trouble(phases: Mapping[str, int], limit: int, kv_tokens: int, engine: EngineMemory, device: Device) -> tuple[str, ...]:
    where = "the memory of a node" if device.shared else f"a device ({device.name})"
    found = [f"{phase}: needs {gib(size)} GiB of {where}, which gives {gib(limit)}" for phase, size in phases.items() if size > limit]
    if kv_tokens < engine.tokens:
        found.append(f"rollout: the KV cache holds {kv_tokens} tokens and must hold {engine.tokens} (rollout.gpu_memory_utilization)")
    return tuple(found)


def nearest_fit(
    config: Config, arch: Architecture, hf: Mapping[str, Any], device: Device, mean_response: int | None, others: Models | None = None
) -> Change | None:
    """The smallest set of changes that fits, and of several the fastest; None when no two changes together fit."""
    singles = list(_changes(config, arch))
    for count in (1, 2):
        found: list[tuple[float, Change]] = []
        for group in itertools.combinations(singles, count):
            change = {key: value for part in group for key, value in part.items()}
            if len(change) < sum(map(len, group)):
                continue
            candidate = changed(config, change)
            try:
                validate(candidate)
                validate_model(candidate, dict(hf))
                result = forecast(candidate, arch, device, mean_response, others)
            except UserError:
                continue
            if not result.trouble:
                found.append((result.step_seconds, change))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    return None


def fit_with_adapters(
    config: Config, arch: Architecture, hf: Mapping[str, Any], device: Device, mean_response: int | None, others: Models | None = None
) -> Change | None:
    """Adapters in place of all weights, and the smallest set of changes that then fits; None when none does."""
    change: Change = {}
    for role in (role for role in config.megatron_roles if hasattr(getattr(config, role), "lora")):
        change[f"{role}.lora.rank"] = 32
        if (others or {}).get(role, arch).experts:
            change[f"{role}.lora.target_modules"] = [name for name in LORA_TARGETS if name not in MLP_MATRICES]
    candidate = changed(config, change)
    if not forecast(candidate, arch, device, mean_response, others).trouble:
        return change
    more = nearest_fit(candidate, arch, hf, device, mean_response, others)
    return None if more is None else change | more


def less_recomputation(
    config: Config, arch: Architecture, hf: Mapping[str, Any], device: Device, mean_response: int | None, others: Models | None = None
) -> tuple[Change, Forecast] | None:
    """A change to the smallest number of recomputed layers that still fits, when a configuration that fits recomputes more."""
    model = config.actor.model
    layers = arch.n_layers // model.pipeline_model_parallel_size
    now = recomputed_layers(model, arch.n_layers)
    for count in sorted({round(layers * part) for part in (0.0, 0.25, 0.5, 0.75)}):
        if count >= round(now * layers):
            return None
        candidate = changed(config, change := recomputation(count))
        validate(candidate)
        validate_model(candidate, dict(hf))
        result = forecast(candidate, arch, device, mean_response, others)
        if not result.trouble:
            return change, result
    return None


def recomputation(layers: int) -> Change:
    """The change to that many recomputed layers in each stage."""
    values = ("full", "block", layers) if layers else (None, None, None)
    return {f"actor.model.recompute_{name}": value for name, value in zip(("granularity", "method", "num_layers"), values)}


def _changes(config: Config, arch: Architecture) -> Iterator[Change]:
    """Changes that a person would try, each with its keys."""
    model = config.actor.model
    layers = arch.n_layers // model.pipeline_model_parallel_size
    done = (model.recompute_num_layers or 0) if model.recompute_granularity == "full" else 0
    for part in (0.25, 0.5, 0.75, 1.0):
        if (count := round(layers * part)) > done:
            yield recomputation(count)
    budget = config.runner.max_tokens_per_mbs
    while (budget := budget // 2) >= config.runner.seq_length:
        yield {"runner.max_tokens_per_mbs": budget}
    if config.runner.max_tokens_per_mbs > config.runner.seq_length:
        yield {"runner.max_tokens_per_mbs": config.runner.seq_length}
    if not config.rollout.offload:
        yield {"rollout.offload": True}
    for percent in sorted(range(30, 95, 5), key=lambda p: abs(p / 100 - config.rollout.gpu_memory_utilization)):  # of equals the nearest
        yield {"rollout.gpu_memory_utilization": percent / 100}
    for role in config.megatron_roles:
        for name in ("offload_weight", "offload_grad", "offload_optimizer"):
            if getattr(getattr(config, role), name, True) is False:
                yield {f"{role}.{name}": True}
    for factor in (2, 4, 8):
        tp = model.tensor_model_parallel_size * factor
        yield {"actor.model.tensor_model_parallel_size": tp, "actor.model.sequence_parallel": True}
        yield {"actor.model.pipeline_model_parallel_size": model.pipeline_model_parallel_size * factor}
        yield {"rollout.tensor_parallel_size": config.rollout.tensor_parallel_size * factor}
    running = config.rollout.max_running_requests
    while config.rollout.rollout_backend == "embedded" and (running := running // 2):
        yield {"rollout.max_running_requests": running}


def changed(config: Config, change: Change) -> Config:
    config = copy.deepcopy(config)
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        setattr(value_of(config, section), name, value)
    return config


def report(result: Forecast, config: Config, device: Device) -> str:
    """The figures as text."""
    lines = [describe(result.placement, config)]
    on = f"{gib(device.memory)} GiB a node" if device.shared else f"{gib(device.memory)} GiB"
    lines.append(f"memory on {device.name} ({on}), GiB:")
    for role, stages in result.ranks.items():
        for stage, a in enumerate(stages):
            name = f"{role} rank of stage {stage}" if len(stages) > 1 else f"{role} rank"
            trained = (
                f"gradients {gib(a.gradients)}  optimizer {gib(a.optimizer)}  activations {gib(a.activations)}  " if a.gradients else ""
            )
            logits = f" (logits of {a.logits_tokens:,} tokens at a time: {gib(a.logits)})" if a.logits else ""
            lines.append(f"  {name}: weights {gib(a.weights)}  {trained}workspace {gib(a.workspace)}{logits}  = {gib(a.total)}   "
                         f"({a.parameters:,} parameters)")  # fmt: skip
    full = result.kv_tokens // config.runner.seq_length
    lines.append(f"  engine device: weights {gib(result.engine.weights)}  KV cache {gib(result.kv_tokens * result.engine.kv_token)} "
                 f"= {result.kv_tokens:,} tokens, {full} sample(s) of seq_length at once")  # fmt: skip
    lines += [f"  fullest while {phase:<9} {gib(size):>7} of {gib(result.limit)}" for phase, size in result.phases.items()]
    if result.host:
        lines.append(
            f"  host memory of the fullest node: {gib(result.host)} for what is offloaded (pinned: torch may take up to twice that)"
        )
    load, total = result.load, result.step_seconds
    lines.append(f"time of a step, seconds, at {load.response} tokens a response on average: {total:.0f}")
    lines += [f"  {phase:<21} {seconds:8.1f}  {seconds / total:4.0%}" for phase, seconds in result.seconds.items()]
    lines += overlap(result, config)
    lines += [f"does not fit: {trouble}" for trouble in result.trouble] or ["it fits"]
    return "\n".join(lines)


def overlap(result: Forecast, config: Config) -> list[str]:
    """A remark for actor and engines on devices of their own: the phases overlap, so their sum is not the time of a step."""
    if result.placement.shares_device("actor", "rollout"):
        return []
    if not config.algorithm.max_staleness:
        return ["  actor and engines have devices of their own, but take turns: with algorithm.max_staleness=1 they work at the same time"]
    rollout = result.seconds["rollout"]
    longest = max(rollout, result.step_seconds - rollout)
    return [f"  generation and training overlap (algorithm.max_staleness), which the sum leaves out: a step takes {longest:.0f} at least"]


def assumptions(device: Device) -> str:
    return (f"assumed of {device.name}: {device.flops / 1e12:.4g} TFLOP/s dense, memory {device.bandwidth / 1e9:.0f} GB/s, "
            f"link {device.link / 1e9:.0f}, network {device.network / 1e9:.4g}, host {device.host / 1e9:.0f} GB/s; "
            "shares reached in practice and the formulas are in rlinf/scheduling/step_time.py; "
            "an estimate, not a measurement")  # fmt: skip


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB // 10 else f"{size / GIB:.3f}"


def words(change: Change) -> str:
    """The changes as `key=value` words of the command line, quoted for a shell where that is needed."""
    return shlex.join(f"{key}={dump(value)}" for key, value in change.items())


def other_models(config: Config) -> dict[str, Architecture]:
    """The architectures of the roles that have a model of their own. Raises UserError where one's shapes are not known."""
    found = {}
    for role in config.megatron_roles[1:]:
        if (folder := config.model_dir_of(role)) != config.rollout.model_dir:
            hf, warnings = planned_model_config(folder, f"{role}.model_dir")
            if hf is None:
                raise UserError(
                    f"{warnings[0]}; a plan needs them: put the model's config.json into a folder and name it in {role}.model_dir"
                )
            found[role] = read_architecture(hf, f"{folder}/config.json")
    return found


def choose_device(name: str | None, config: Config) -> Device:
    """The device that was asked for; otherwise this machine's slots for cluster.device: cpu, and an H100 for everything else."""
    if name is None:
        name = "cpu" if config.cluster.device == "cpu" else "h100"
    if name != "cpu" and name not in GPUS:
        raise UserError(f"--device {name}: not known; known are cpu, {', '.join(GPUS)}")
    return cpu_device(config.cluster.num_gpus_per_node) if name == "cpu" else GPUS[name]


def main(resolved: Resolved, device_name: str | None, mean_response: int | None, as_json: bool) -> int:
    """Print the plan; 0 when it fits, 2 when the configuration must change."""
    config = resolved.config
    validate(config, resolved.provenance)
    longest = config.algorithm.sampling_params.max_new_tokens
    if mean_response and mean_response > longest:
        raise UserError(f"--mean-response {mean_response}: no response is longer than algorithm.sampling_params.max_new_tokens, {longest}")
    hf, warnings = check_models(config, planned=True)
    if hf is None:
        raise UserError(f"{warnings[0]}; a plan needs them: put the model's config.json into a folder and name it in rollout.model_dir")
    arch, device = read_architecture(hf, f"{config.rollout.model_dir}/config.json"), choose_device(device_name, config)
    others = other_models(config)
    result = forecast(config, arch, device, mean_response, others)
    change = nearest_fit(config, arch, hf, device, mean_response, others) if result.trouble else None
    adapted = None
    if result.trouble and change is None and not config.actor.lora.rank:
        adapted = fit_with_adapters(config, arch, hf, device, mean_response, others)
    spared = None if result.trouble else less_recomputation(config, arch, hf, device, mean_response, others)
    if as_json:
        seats = {c: len(result.placement.of(c)) for c in (*config.megatron_roles, "rollout", "reward")}
        ranks = {role: [asdict(s) | {"total": s.total} for s in stages] for role, stages in result.ranks.items()}
        content = {
            "device": asdict(device), "mode": result.placement.mode, "seats": seats,
            **ranks, "engine": asdict(result.engine),
            "kv_tokens": result.kv_tokens, "phases": result.phases, "host": result.host, "limit": result.limit, "load": asdict(result.load),
            "seconds": result.seconds, "fits": not result.trouble, "trouble": result.trouble, "change": change,
            "change_with_adapters": adapted,
            "less_recomputation": spared and {"change": spared[0], "seconds": spared[1].seconds, "phases": spared[1].phases},
        }  # fmt: skip
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return 2 if result.trouble else 0
    lines = [f"config: {resolved.source}", report(result, config, device)]
    if change:
        lines.append(f"nearest change that fits: {words(change)}")
    elif spared:
        lines.append(f"fits as well, and is faster: {words(spared[0])} ({spared[1].step_seconds - result.step_seconds:+.1f} s a step, "
                     f"{gib(spared[1].phases['training'])} GiB while training)")  # fmt: skip
    elif result.trouble:
        lines.append("no one or two changes make it fit: use a larger device, more devices, or a shorter runner.seq_length")
        if adapted:
            lines.append(f"with adapters in place of all weights it fits: {words(adapted)} (docs/lora.md)")
    if mean_response is None:
        lines.append(f"mean response length is taken as {MEAN_SHARE:.0%} of max_new_tokens; give yours with --mean-response")
    sys.stdout.write("\n".join([*lines, assumptions(device), *(f"warning: {w}" for w in warnings)]) + "\n")
    return 2 if result.trouble else 0
