"""Computes the metrics of a step from the headers of its groups, the counters of the engines and the reports of the training ranks.

What each metric means: rlinf/metrics/names.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader, Status
from rlinf.rollout.contract import EngineStats
from rlinf.scheduling.flops import Work, forward_flops, generation_work
from rlinf.weights.architecture import Architecture
from rlinf.workers.interfaces import TrainReport

PARTS = {  # timer of a part of the step -> what the part is called in the names of metrics
    "forward_backward": "",
    "critic_update": "",
    "recompute_logprobs": "_recompute",
    "values": "_values",
    "token_rewards": "",
}
TRAINS = ("forward_backward", "critic_update")


def rollout_metrics(headers: Sequence[GroupHeader]) -> dict[str, float]:
    """What all groups of a step say about the policy. Raises ValueError where a verdict is missing."""
    rewards = [r for h in headers for r in h.rewards]
    verdicts = [v for h in headers for v in h.verdicts if v is not None]
    lengths = np.array([n for h in headers for n in h.response_lengths], dtype=np.float64)
    prompts = np.array([h.prompt_length for h in headers for _ in h.sample_ids], dtype=np.float64)
    finishes = [f for h in headers for f in h.finishes]
    metrics = {
        "rewards": np.mean(rewards),
        "accuracy": np.mean([r for h in headers for r in h.right]),
        "response_length": lengths.mean(),
        "response_length_p50": np.quantile(lengths, 0.5),
        "response_length_p95": np.quantile(lengths, 0.95),
        "response_length_max": lengths.max(),
        "prompt_length": np.mean([h.prompt_length for h in headers]),
        "samples": len(lengths),
        "total_tokens": prompts.sum() + lengths.sum(),
        "truncated": np.mean([f.cut_off for f in finishes]),
        "aborted": np.mean([f is Finish.ABORT for f in finishes]),
        "no_box": np.mean([v.extracted is None for v in verdicts]),
        "no_answer": np.mean([v.route == "no_answer" for v in verdicts]),
        "verdict_undecided": np.mean([v.status is Status.UNDECIDED for v in verdicts]),
        "groups_all_right": np.mean([all(h.right) for h in headers]),
        "groups_all_wrong": np.mean([not any(h.right) for h in headers]),
    }
    if any(name.startswith("own/") for v in verdicts for name, _ in v.parts):
        metrics["own_parts_failed"] = np.mean([bool(v.failed) for v in verdicts])
        for part in sorted({name.removeprefix("own/") for v in verdicts for name, _ in v.parts if name.startswith("own/")}):
            metrics[f"reward_own_failed/{part}"] = np.mean([part in dict(v.failed) for v in verdicts])
    for part in sorted({name for v in verdicts for name, _ in v.parts}):
        metrics[f"reward_{part}"] = np.mean([dict(v.parts).get(part, 0.0) for v in verdicts])
    return {f"rollout/{name}": float(value) for name, value in metrics.items()}


def dynamic_sampling_metrics(generated: int, used: int, filtered: int) -> dict[str, float]:
    """How many prompts of a step were answered, how many of these were needed, and how many of those were filtered out (no signal)."""
    return {f"rollout/prompts_{name}": float(n) for name, n in (("generated", generated), ("used", used), ("filtered", filtered))}


def advantage_metrics(advantages: Sequence[np.ndarray], trained: Sequence[np.ndarray], config: Config) -> dict[str, float]:
    """Statistics of the advantages of the samples that are trained on.

    advantages: for each group an array [samples]. trained: for each group which samples are trained on (bool); the others took no part in
    the whitening, so their values say nothing. Empty with a critic: the actor then computes the advantages, token by token.
    """
    flat = np.concatenate([group[chosen] for group, chosen in zip(advantages, trained, strict=True)])
    if config.has_critic or not len(flat):
        return {}
    found = {"mean": flat.mean(), "max": flat.max(), "min": flat.min(), "zero": np.mean(flat == 0)}
    return {f"rollout/advantages_{name}": float(value) for name, value in found.items()}


def staleness_metrics(headers: Sequence[GroupHeader], version: int) -> dict[str, float]:
    """Versions between the weights that decoded a token and those that are trained: mean over tokens, and the largest."""
    pairs = np.array([(version - v, n) for h in headers for sample in h.versions for v, n in sample], dtype=np.float64).reshape(-1, 2)
    tokens = pairs[:, 1].sum()
    mean = float((pairs[:, 0] * pairs[:, 1]).sum() / tokens) if tokens else 0.0
    return {"rollout/staleness_mean": mean, "rollout/staleness_max": float(pairs[:, 0].max(initial=0.0))}


def engine_metrics(stats: Sequence[EngineStats]) -> dict[str, float]:
    """Metrics from what the engines counted in a step."""
    decoded, busy = sum(s.decoded_tokens for s in stats), max(s.busy_seconds for s in stats)
    return {
        "rollout/reused_tokens": float(sum(s.reused_tokens for s in stats)),
        "rollout/truncated_mass": sum(s.truncated_mass for s in stats) / max(1, decoded),
        "perf/rollout_tokens_per_second": decoded / busy if busy else 0.0,
        "perf/rollout_memory_gib": max(s.memory_bytes for s in stats) / 2**30,
    }


def engine_speed_metrics(
    generated: Sequence[GroupHeader], stats: Sequence[EngineStats], arch: Architecture, devices: int, peak_tflops: float | None
) -> dict[str, float]:
    """How fast the engines were; at least one must have been busy. devices: the number of devices of all engines together.
    peak_tflops: see peak_flops."""
    work = sum((generation_work(h.prompt_length, h.response_lengths) for h in generated), Work())
    speed = forward_flops(arch, work) / devices / max(s.busy_seconds for s in stats)
    metrics = {"perf/rollout_tflops": speed / 1e12}
    if peak := peak_flops(peak_tflops, stats[0].peak_flops):
        metrics["perf/rollout_mfu"] = speed / peak
    return metrics


def token_reward_metrics(headers: Sequence[GroupHeader], scores: Mapping[str, float]) -> dict[str, float]:
    """Statistics of the scores before they are weighted: of all responses, and of right and of wrong ones where there are any."""
    right = {name: is_right for h in headers for name, is_right in zip(h.sample_ids, h.right)}
    values = np.array([scores[name] for name in right])
    found = {"mean": values.mean(), "max": values.max(), "min": values.min()}
    for name, chosen in (("right", np.array(list(right.values()))), ("wrong", ~np.array(list(right.values())))):
        if chosen.any():
            found[name] = values[chosen].mean()
    return {f"rollout/token_reward_{name}": float(value) for name, value in found.items()}


def report_metrics(reports: Sequence[TrainReport], role: str, peak_tflops: float | None = None) -> dict[str, float]:
    """Metrics from the reports of a role's ranks: its metrics, the seconds of the slowest rank, the largest memory, and the speeds."""
    slowest = {name: max(r.timers[name] for r in reports) for name in reports[0].timers}
    memory = {f"perf/{role}_memory_gib": max(r.memory_bytes for r in reports) / 2**30}
    return reports[0].metrics | slowest | memory | speed_metrics(reports, role, slowest, peak_tflops)


def speed_metrics(reports: Sequence[TrainReport], role: str, seconds: Mapping[str, float], peak_tflops: float | None) -> dict[str, float]:
    """Floating-point operations per second of one rank in each part of the step, and their share of the peak of its device (mfu, hfu) where
    that is known.

    mfu counts the operations of the model, hfu also those that activation recompute adds. peak_tflops: see peak_flops.
    """
    peak = peak_flops(peak_tflops, reports[0].peak_flops)
    found = {}
    for part, name in PARTS.items():
        flops = sum(r.flops.get(part, 0.0) for r in reports) / len(reports)
        if not flops:
            continue
        speed = flops / seconds[f"time/{part}"]
        found[f"perf/{role}{name}_tflops"] = speed / 1e12
        if peak:
            found[f"perf/{role}{name}_mfu"] = speed / peak
        if peak and part in TRAINS:
            again = sum(r.flops["again"] for r in reports) / len(reports)
            found[f"perf/{role}{name}_hfu"] = (flops + again) / seconds[f"time/{part}"] / peak
    return found


def peak_flops(peak_tflops: float | None, data_sheet: float) -> float:
    """Peak operations per second of a device: runner.peak_tflops, or else the number in its data sheet; 0 = not known."""
    return peak_tflops * 1e12 if peak_tflops else data_sheet
