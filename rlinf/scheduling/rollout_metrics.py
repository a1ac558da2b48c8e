"""What the headers of a step say about the policy: the rollout/ metrics. Meanings: rlinf/metrics/names.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlinf.data.records import Finish, GroupHeader, Status


def rollout_metrics(headers: Sequence[GroupHeader], advantages: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """rollout/* of one step. advantages: as given to the step plan, one array a group. Raises ValueError where a verdict is missing."""
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
    for part in sorted({name for v in verdicts for name, _ in v.parts}):
        metrics[f"reward_{part}"] = np.mean([dict(v.parts).get(part, 0.0) for v in verdicts])
    if len(advantages):
        flat = np.concatenate(advantages)
        metrics |= {
            "advantages_mean": flat.mean(),
            "advantages_max": flat.max(),
            "advantages_min": flat.min(),
            "advantages_zero": np.mean(flat == 0),
        }
    return {f"rollout/{name}": float(value) for name, value in metrics.items()}
