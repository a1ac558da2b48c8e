"""The metrics of time, speed, memory and weight transfer: see names.py."""

from __future__ import annotations

from rlinf.metrics.metric import metrics


def speeds_of(what: str, when: str, trains: bool = True) -> list[tuple[str, str, str, str]]:
    """The metrics of achieved operations per second of one device, and of utilisation (docs/debugging.md has the formula)."""
    rows = [
        (
            f"{what}_tflops",
            f"10^12 operations a second and device that the model asks for, in {when}",
            "steady",
            "as for `train_tokens_per_second`",
        )
    ]
    rows.append(
        (
            f"{what}_mfu",
            f"`{what}_tflops` as a share of the device's peak, where that is known",
            "0.3 to 0.5 in training, far less in decoding",
            "—",
        )
    )
    return rows + [(f"{what}_hfu", f"as `{what}_mfu`, with what activation recompute adds", "at least the mfu", "—")] * trains


def memory_of(what: str, of: str, action: str) -> tuple[str, str, str, str]:
    return f"{what}_memory_gib", f"peak memory of {of}, GiB", "below the device's", action


SYSTEM = [
    *metrics(
        "time",
        ("step", "seconds of the whole step", "steady", "compare the phases"),
        ("overlap", "seconds in which more than one phase ran; absent where none did", "large in a run that generates ahead", "—"),
        (
            "alone_*",
            "with `overlap`: seconds in which this phase ran and no other; what a step would gain if it took no time",
            "small",
            "fix the largest",
        ),
        (
            "*",
            "seconds in which a phase of the step ran (rollout, train, sync_weights, validate, checkpoint), or of a part of `train`, "
            "slowest rank",
            "rollout is usually the largest",
            "the largest phase is where to look",
        ),
    ),
    *metrics(
        "perf",
        (
            "tokens_per_second",
            "prompt and response tokens of the step per second of the step",
            "steady",
            "falls: longer responses, or a slow node",
        ),
        (
            "rollout_tokens_per_second",
            "generated tokens per second of rollout",
            "steady",
            "few running requests: raise `max_running_requests`",
        ),
        (
            "train_tokens_per_second",
            "trained tokens per second of training",
            "steady",
            "many small micro-batches: raise `max_tokens_per_mbs`",
        ),
        memory_of("actor", "an actor rank", "activation recompute, smaller `max_tokens_per_mbs`"),
        memory_of("token_reward", "a rank of the token reward model", "as for `actor_memory_gib`"),
        memory_of("critic", "a critic rank", "as for `actor_memory_gib`"),
        memory_of("rollout", "a rollout worker (of SGLang without the server)", "lower `gpu_memory_utilization`"),
        *speeds_of("actor", "`time/forward_backward`"),
        *speeds_of("critic", "`time/critic_update`"),
        *speeds_of("actor_recompute", "`time/recompute_logprobs`", trains=False),
        *speeds_of("token_reward", "`time/token_rewards`", trains=False),
        *speeds_of("critic_values", "`time/values`", trains=False),
        *speeds_of("rollout", "the busiest engine's seconds, for the responses of the step", trains=False),
    ),
    *metrics(
        "sync",
        (
            "gather_seconds",
            "seconds in which the actor gathered and wrote its weights, slowest rank",
            "steady",
            "the network between the ranks",
        ),
        ("load_seconds", "seconds in which an engine read and took them, slowest engine", "steady", "the memory or network between them"),
        ("gib", "GiB of weights moved", "constant", "—"),
        (
            "probe_gap_max",
            "largest log-probability difference of engine and actor on the probe prompts",
            "fp32 below 1e-4; bf16 below 0.2",
            "the engine does not hold the actor's weights: the run stops",
        ),
    ),
]
