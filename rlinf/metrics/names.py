"""All metrics of a run: the name of each, what it means, which values are healthy, and what to do when they are not.

docs/metrics.md is made from this table: `python -m rlinf.metrics.names > docs/metrics.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase

from rlinf.metrics.metric import Metric, metrics
from rlinf.metrics.system_names import SYSTEM


def optimizer_of(what: str) -> list[tuple[str, str, str, str]]:
    return [
        (
            "grad_norm",
            f"global gradient norm of the {what} before clipping, mean over the step's optimizer steps",
            "steady, same order as `clip_grad`",
            "spikes: a bad batch, or too high a learning rate",
        ),
        ("lr", f"learning rate of the {what}'s last optimizer step of the step", "follows the schedule", "—"),
    ]


ROLLOUT = metrics(
    "rollout",
    (
        "rewards",
        "mean reward of the step's responses, in units of ±`reward.reward_scale`",
        "rises, with noise, within tens of steps",
        "flat: look at `groups_all_wrong` (too hard) and `groups_all_right` (too easy), then at `no_box`",
    ),
    ("accuracy", "share of responses with a right answer; undecided ones count as not right", "rises with `rewards`", "as for `rewards`"),
    (
        "response_length",
        "mean generated tokens of a response, end token included",
        "drifts slowly; for reasoning models it often grows",
        "collapse to a few tokens: the reward can be had without reasoning; growth with `truncated`: raise `max_new_tokens`",
    ),
    ("response_length_p50", "median of the response length", "near the mean, or below it", "—"),
    ("response_length_p95", "95th percentile of the response length", "below `max_new_tokens`", "at the limit: responses are cut"),
    ("response_length_max", "longest response", "at most `max_new_tokens`", "—"),
    ("prompt_length", "mean prompt tokens", "constant up to sampling", "jumps: the data order or the filter changed"),
    (
        "samples",
        "responses of the step, with `dynamic_sampling` also of the groups that were left out",
        "rollout_batch_size × group_size, more with `dynamic_sampling`",
        "fewer: groups came back incomplete",
    ),
    (
        "prompts_generated",
        "with `dynamic_sampling`: prompts answered in the step",
        "—",
        "far above `prompts_used`: smaller `dynamic_sampling_batch_size`",
    ),
    ("prompts_used", "with `dynamic_sampling`: prompts that the step took from the data; the others come again in the next step", "—", "—"),
    (
        "prompts_filtered",
        "with `dynamic_sampling`: used prompts whose answers were all right or all wrong, not trained on",
        "below half of `prompts_used`",
        "as for `groups_all_right` and `groups_all_wrong`",
    ),
    ("total_tokens", "prompt tokens (once a response) and response tokens of the step", "—", "—"),
    (
        "truncated",
        "share of responses cut by `max_new_tokens` or by the context window",
        "below 0.1",
        "raise `max_new_tokens`, or shorten answers; a cut response is usually graded wrong",
    ),
    (
        "staleness_mean",
        "versions of the weights between those that decoded a token and those that are trained, mean over tokens",
        "0 when `algorithm.max_staleness` is 0, else at most that",
        "above 2 or so learning suffers: use `decoupled-ppo` or a lower `max_staleness`",
    ),
    ("staleness_max", "the same, of the oldest token", "at most `algorithm.max_staleness`", "—"),
    (
        "engine_restarts",
        "engines that died and were started anew since the run began",
        "0",
        "look for the reason in the log of the rollout worker",
    ),
    (
        "carried_over",
        "groups that were begun and go on beyond this step (`algorithm.schedule: wallclock`)",
        "less than the groups of a batch",
        "—",
    ),
    (
        "length_bias",
        "mean response length of the groups of the last `max_staleness` + 1 steps, against those that had been trained on in the order of "
        "beginning, as a share; answers that are still being generated count with the length expected of them "
        "([how](rollout.md#which-answers-come-first); `algorithm.schedule: wallclock`)",
        "below 0 in the first `max_staleness` steps, then around 0",
        "below 0 for long: answers get longer and the long ones come late; lower `max_staleness` or `rollout.over_provisioning`",
    ),
    ("aborted", "share of responses that were aborted", "0 in synchronous runs", "look for engine errors in the rollout logs"),
    (
        "no_box",
        "share of responses in which no answer was found",
        "falls towards 0",
        "the prompt does not make the model give its answer in the expected form",
    ),
    (
        "no_answer",
        "share of responses that never end the thinking section in which the prompt or they themselves began",
        "falls towards 0",
        "with `truncated` high: raise `max_new_tokens`",
    ),
    (
        "verdict_undecided",
        "share of verdicts that timed out or could not be parsed",
        "below 0.01",
        "raise `reward.timeout`; look at those answers in samples/",
    ),
    ("reward_format", "mean of the format part of the reward (`reward.format_reward`)", "rises to `reward.format_reward`", "—"),
    ("reward_four_levels", "mean of what the four levels change in the reward of correctness alone (`reward.four_levels`)", "—", "—"),
    ("reward_overlong", "mean of the length penalty near the limit (`reward.overlong_buffer`)", "near 0", "as for `truncated`"),
    (
        "reward_own/*",
        "mean of a part of the reward that a function of yours gives (`reward.own_parts`, `reward.own_group_parts`), by its name",
        "—",
        "—",
    ),
    (
        "own_parts_failed",
        "share of responses of which a function of `reward.own_parts` or `reward.own_group_parts` gave no number, so that its part is 0",
        "0",
        "read the reasons in samples/; raise `reward.own_timeout`, or fix the function",
    ),
    ("reward_own_failed/*", "the same of one part, by its name", "0", "as for `own_parts_failed`"),
    ("reward_exploration", "mean of the penalty for short responses (`reward.exploration_penalty`)", "rises towards 0", "—"),
    (
        "token_reward_mean",
        "mean over responses of what the token reward model says of them (`token_reward.reduce`), before `token_reward.weight`; "
        "it is not in `rewards`. Of a teacher it is minus the estimated KL a token from policy to teacher",
        "rises with `rewards`; of a teacher to 0",
        "rises while `accuracy` falls: the policy games the model; lower `token_reward.weight`",
    ),
    ("token_reward_max", "largest such score", "steady", "—"),
    ("token_reward_min", "smallest such score", "steady", "—"),
    (
        "token_reward_right",
        "mean such score of right answers",
        "above `token_reward_wrong`",
        "at or below it: the model does not know right from wrong here",
    ),
    ("token_reward_wrong", "mean such score of wrong answers", "below `token_reward_right`", "as for `token_reward_right`"),
    ("groups_all_right", "share of prompts whose responses are all right: no learning signal", "below 0.5", "harder data"),
    (
        "groups_all_wrong",
        "share of prompts without a right response: no learning signal",
        "below 0.5",
        "easier data, a larger `group_size`, a better start model",
    ),
    (
        "advantages_mean",
        "mean advantage over responses that are trained on; with `kl_in: reward` or `gamma` < 1 before what differs from token to token, "
        "and before whitening",
        "near 0",
        "far from 0: responses of very different lengths under whitening",
    ),
    ("advantages_max", "largest such advantage", "below 10", "one right answer among many wrong ones is rare luck: larger batch"),
    ("advantages_min", "smallest such advantage", "above −10", "—"),
    (
        "advantages_zero",
        "share of these responses whose advantage is exactly 0: trained on without effect",
        "below 0.5",
        "as for `groups_all_right` and `groups_all_wrong`",
    ),
    (
        "truncated_mass",
        "probability mass cut off by top-p/top-k, mean over tokens",
        "0 when both are off; NaN with SGLang when one is on: it does not say",
        "log-probabilities are of the whole distribution: keep it below 0.01",
    ),
    (
        "reused_tokens",
        "prompt tokens whose KV was shared by the samples of a group",
        "(group_size − 1) × prompt tokens",
        "0: prefix sharing is off",
    ),
)

TRAIN = metrics(
    "train",
    (
        "loss",
        "policy loss, mean over the step's mini-batches; without KL and entropy terms",
        "near 0; its level says little",
        "NaN or a jump: see `ratio`, `grad_norm`",
    ),
    (
        "entropy_loss",
        "mean token entropy (nats, ≥ 0) of the policy at the run's temperature",
        "falls slowly",
        "below 0.05 early: collapse; raise `clip_ratio_high`, add `entropy_bonus`; rising without end: lower the learning rate",
    ),
    ("kl_loss", "mean token KL to the reference policy (`kl_penalty_type`), before `kl_beta`", "grows slowly, below 1", "raise `kl_beta`"),
    (
        "ratio",
        "token mean of π/π_old",
        "1 in the first mini-batch, within 0.9–1.1 later",
        "far from 1: lower `actor.optim.lr`, fewer `n_minibatches` or `update_epochs`",
    ),
    (
        "first_minibatch_ratio",
        "`ratio` of the step's first mini-batch in which a token counts, alone",
        "exactly 1 with `recompute_logprobs`; else 1 up to the engine's rounding",
        "as for `rollout_logprob_gap_mean`",
    ),
    (
        "first_minibatch_clip_fraction",
        "`clip_fraction` of the same mini-batch",
        "0 with `recompute_logprobs`",
        "as for `rollout_logprob_gap_mean`",
    ),
    (
        "clip_fraction",
        "share of tokens whose loss the clip range decided (for CISPO: whose weight it bounded)",
        "0 in the first mini-batch, below 0.1; GSPO about 0.15",
        "as for `ratio`",
    ),
    ("dual_clip_fraction", "share of tokens bounded by `clip_ratio_c`", "below 0.001", "as for `ratio`"),
    ("approx_kl", "k3 estimate of KL(π_old‖π) per token", "below 0.02", "as for `ratio`"),
    (
        "rollout_logprob_gap_mean",
        "mean distance between the log-probabilities that π_old and the rollout engine give the sampled tokens: same weights, but for "
        "tokens of an earlier version (`rollout/staleness_mean`), for which it is also how far the policy has come since",
        "fp32 below 1e-5; bf16 below 0.02; more where tokens are stale; always 0 with `recompute_logprobs: false`, where the engine's "
        "stand for the actor's (but for `decoupled-ppo`, whose π_prox is interpolated): then look at `first_minibatch_ratio`",
        "a step change after a weight sync: wrong weights; constantly high: different precision, temperature or template",
    ),
    ("rollout_logprob_gap_max", "largest such gap", "fp32 below 1e-4; bf16 below 1", "as for the mean"),
    (
        "importance_weight_mean",
        "mean of π_old/μ (actor over engine), before truncation",
        "0.99–1.01",
        "the engine samples from another policy than the actor's",
    ),
    ("importance_weight_max", "largest π_old/μ", "below 10", "as for the mean"),
    ("importance_weight_min", "smallest π_old/μ", "above 0.1", "as for the mean"),
    (
        "importance_weight_clipped",
        "share of tokens whose weight was cut off at the bound, or set to 0 outside the bounds",
        "below 0.01",
        "as for the mean",
    ),
    ("rollout_kl", "k3 estimate of KL(engine‖actor) per token", "below 0.001", "as for the mean"),
    ("tokens", "response tokens that counted in the loss, once for each pass over them", "—", "—"),
    (
        "samples",
        "responses trained on",
        "the step's; fewer with `overlong_filtering` or `num_update_sample_per_prompt`",
        "0: all responses were cut off; raise `max_new_tokens`",
    ),
    *optimizer_of("policy"),
    (
        "expert_load_max",
        "mixtures of experts: the share of a layer's most used expert in the choices of the response tokens, times the number of experts; "
        "the largest of all layers",
        "steady; 1 would be even, and models are far from it",
        "rises for many steps: the router sends everything to few experts; lower the learning rate",
    ),
    (
        "experts_unused",
        "mixtures of experts: share of all experts to which no response token of the step went",
        "steady",
        "as for the load",
    ),
    ("loss_scale", "fp16: loss scale of the step's last mini-batch", "steady", "falls for many steps: overflow; use bf16"),
    (
        "minibatches_skipped",
        "mini-batches not stepped: the ratio exceeded `early_stop_imp_ratio` or was NaN, no token counted, or a gradient was not finite",
        "0",
        "now and then: harmless; often: lower the learning rate, check `rollout_logprob_gap_max`",
    ),
)

SFT = metrics(
    "sft",
    (
        "loss",
        "mean negative log-likelihood of the step's response tokens, before the step",
        "falls",
        "flat: raise the learning rate; a jump: see `grad_norm`",
    ),
    (
        "objective",
        "what was minimised: `loss`, or with `sft.reweighting` the weighted mean of the examples' losses",
        "as `loss`; with `lin_upper` above the mean of the examples",
        "as for `loss`",
    ),
    (
        "val_loss",
        "`loss` on the held-out examples",
        "falls with `loss`",
        "rises while `loss` falls: overfitting; fewer epochs, or more data",
    ),
    ("entropy", "mean token entropy (nats) on the response tokens", "falls slowly", "near 0: the data is memorised"),
    ("val_entropy", "`entropy` on the held-out examples", "as `entropy`", "—"),
    ("tokens", "response tokens of the step", "—", "—"),
    *optimizer_of("model"),
    ("skipped", "1 when the gradient was not finite and nothing was stepped", "0", "fp16: now and then is harmless; else look at the data"),
)

CRITIC = metrics(
    "critic",
    (
        "loss",
        "value loss, half the squared error (with `critic.value_clip`), mean over the step's mini-batches",
        "falls",
        "see `explained_variance`",
    ),
    (
        "value_mean",
        "token mean of the values before the step's update, in units of reward",
        "follows `return_mean`",
        "far off: raise `critic.optim.lr`",
    ),
    ("return_mean", "token mean of what the values are trained towards", "rises with `rollout/rewards`", "—"),
    ("value_error", "root mean square of target minus value", "falls below the spread of the rewards", "as for `explained_variance`"),
    ("value_error_max", "largest such error", "below the range of the rewards", "—"),
    (
        "explained_variance",
        "share of the targets' variance that the values explain: 1 = all, 0 = none; not finite when all targets are equal",
        "rises above 0 within tens of steps",
        "at or below 0 for long: a longer `critic.warmup_steps`, a higher `critic.optim.lr`, a larger `critic.value_clip`",
    ),
    (
        "clip_fraction",
        "share of tokens whose loss `critic.value_clip` decided",
        "0 in the first mini-batch, below 0.2",
        "high: the values cannot follow; a larger `critic.value_clip`, or null",
    ),
    *optimizer_of("critic"),
    (
        "minibatches_skipped",
        "mini-batches that did not step the critic: no token counted, or the gradient was not finite",
        "0",
        "lower `critic.optim.lr`",
    ),
)

EVAL = metrics(
    "eval",
    (
        "accuracy",
        "share of right answers to the held-out problems, as `validation` samples them (greedy: one to each)",
        "rises with `rollout/accuracy`",
        "falls while training accuracy rises: overfitting; more data or fewer epochs",
    ),
    ("boxed", "share of held-out responses with an answer box", "near 1", "as for `rollout/no_box`"),
    ("response_length", "mean tokens of a held-out response", "like training", "—"),
    ("truncated", "share of held-out responses that were cut", "below 0.1", "raise `max_new_tokens`"),
    ("undecided", "share of held-out verdicts that were undecided", "below 0.01", "as for `rollout/verdict_undecided`"),
    (
        "pass_at_n",
        "share of held-out problems with a right answer among `validation.n`",
        "well above `accuracy`",
        "near it: no exploration left",
    ),
    ("*/*", "each of these for one of several validation files, by its name, as in `eval/accuracy/aime24`", "—", "—"),
)

BENCHMARK = metrics(
    "benchmark",
    (
        "*",
        "a score of `rlinf eval`, as `benchmark/aime24/avg@32`: avg@n, pass@k, maj@k, g-pass@k_τ, mg-pass@k, response_length, truncated, "
        "no_box, undecided; the x axis is the checkpoint's step",
        "docs/evaluation.md",
        "—",
    ),
)

SECTIONS = {
    "What the policy writes": ROLLOUT,
    "What training does": TRAIN,
    "What the critic learns (`adv_type: gae`)": CRITIC,
    "Supervised fine-tuning": SFT,
    "Held-out problems": EVAL,
    "Benchmarks": BENCHMARK,
    "Time, speed and weights": SYSTEM,
}
METRICS = {m.name: m for rows in SECTIONS.values() for m in rows}


def metric_of(name: str) -> Metric | None:
    """What the table says of a metric, or of its family."""
    return METRICS.get(name) or next((metric for known, metric in METRICS.items() if fnmatchcase(name, known)), None)


def undocumented(names: Iterable[str]) -> list[str]:
    """The names that are not in the table; for tests."""
    return sorted(n for n in names if metric_of(n) is None)


def markdown() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written from `rlinf/metrics/names.py`. Every metric is in `metrics.jsonl` and in TensorBoard under the same name; the x axis is",
        "the step everywhere. Means are over the whole step and over all ranks; none depends on how the work was split. A number that is",
        "not finite is `null` in `metrics.jsonl`; so is the mean over the tokens that count in a step that trained on none.",
        "",
        "Look first at `rollout/rewards` and `rollout/accuracy`, at `rollout/truncated`, `rollout/no_box` and `train/entropy_loss`, at",
        "`train/rollout_logprob_gap_mean`, and at `eval/accuracy` on held-out problems. The level of `train/loss` says little.",
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", "| name | meaning | healthy | what to do |", "|---|---|---|---|"]
        lines += [f"| `{m.name}` | {m.meaning} | {m.healthy} | {m.action} |" for m in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
