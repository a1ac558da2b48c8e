"""Rules that find what is wrong with a run: each looks for one cause, reports it with its evidence, and is silent on a healthy run.

A rule returns a Finding or None. Windows are in steps. A rule is silent when the run does not have its metrics. What is a consequence of
another finding is reported as part of that one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from rlinf.algorithms.advantages import COMPARING
from rlinf.report.run_data import RunData
from rlinf.report.task_counts import TaskCounts, totals

WINDOW = 10  # steps within which a fall counts as fast
RECENT = 20  # steps whose samples are looked at together
MIN_SAMPLES = 40  # of a task, before anything is said about its verifier


@dataclass(frozen=True)
class Finding:
    """cause: what is probably wrong. advice: what to do, in order. metrics, keys, steps: where to look in the report."""

    rule: str
    title: str
    evidence: tuple[str, ...]
    cause: str
    advice: tuple[str, ...]
    steps: tuple[int, ...]
    metrics: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def find_problems(run: RunData) -> list[Finding]:
    """The findings in the order of RULES, without those that another finding explains."""
    found = {finding.rule: finding for rule in RULES for finding in [rule(run)] if finding is not None}
    explained = {effect for cause in found for effect in EXPLAINS.get(cause, ())}
    return [with_effects(f, [found[e] for e in EXPLAINS.get(f.rule, ()) if e in found]) for f in found.values() if f.rule not in explained]


def with_effects(cause: Finding, effects: Sequence[Finding]) -> Finding:
    more = tuple(f"it may well be why: {effect.title} ({effect.evidence[0]})" for effect in effects)
    return replace(cause, evidence=cause.evidence + more)


def entropy_collapse(run: RunData) -> Finding | None:
    """Entropy falls by 60 % within WINDOW steps, or ends near 0, while accuracy does not rise (arXiv 2505.22617)."""
    steps, raw = run.series("train/entropy_loss")
    accuracy = dict(zip(*run.series("rollout/accuracy")))
    if len(steps) < 5 or not all(s in accuracy for s in steps):
        return None
    entropy, right = smooth(raw), level([accuracy[s] for s in steps])
    falls = [
        (i, j)
        for j in range(len(steps))
        for i in [max(range(max(0, j - WINDOW), j + 1), key=entropy.__getitem__)]
        if entropy[j] < 0.4 * entropy[i] and max(right[j:]) < min(0.8, right[i] + 0.1) and max(entropy[j : j + 5]) < 0.6 * entropy[i]
    ]
    tail = min(5, len(steps))
    sunk = mean(raw[-tail:]) < min(0.05, mean(raw[:tail]) / 4) and mean(right[-tail:]) < 0.5
    if not falls and not sunk:
        return None
    i, j = min(falls, key=lambda ends: entropy[ends[1]] / entropy[ends[0]]) if falls else (0, len(steps) - 1)
    levels = f"({entropy[i]:.3g} at step {steps[i]}, {entropy[j]:.3g} at step {steps[j]})"
    fell = f"entropy fell by {1 - entropy[j] / entropy[i]:.0%} in {steps[j] - steps[i]} steps {levels}"
    evidence = [fell, f"accuracy over the same steps: {right[i]:.1%} to {right[j]:.1%}: the certainty was not earned"]
    if (counts := run.counts.get(steps[-1])) is not None and counts.identical_groups:
        evidence.append(f"in step {steps[-1]} {counts.identical_groups} of {counts.groups} prompts got the same response from every sample")
    return Finding(
        "entropy-collapse", "Entropy collapse: the policy has stopped exploring", tuple(evidence),
        "The policy became nearly deterministic before it was right. The samples of a group are then alike, their advantages vanish, and "
        "nothing more is learned.",
        ("Go back to a checkpoint before the fall.",
         "Raise the upper clip range (clip-higher, e.g. 0.28), or add a small entropy bonus (0.001 to 0.01).",
         "Lower the learning rate, or take fewer optimizer steps a batch.", "Check that rollouts sample at temperature 1."),
        (steps[i], steps[j], steps[-1]), ("train/entropy_loss", "rollout/advantages_zero", "train/clip_fraction"),
        ("algorithm.clip_ratio_high", "algorithm.entropy_bonus", "actor.optim.lr", "algorithm.n_minibatches", "algorithm.update_epochs",
         "algorithm.sampling_params.temperature"),
    )  # fmt: skip


def broken_verifier(run: RunData) -> Finding | None:
    """The verdicts of one task contradict the texts, or the verifier cannot decide."""
    recent = sorted(run.counts)[-RECENT:]
    tasks = {name: c for name, c in totals(run.counts[s] for s in recent).items() if c.samples >= MIN_SAMPLES}
    suspects = {name: signs for name, c in tasks.items() if (signs := verifier_signs(c, [o for n, o in tasks.items() if n != name]))}
    if not suspects:
        return None
    names = ", ".join(f"“{name}”" for name in suspects)
    return Finding(
        "broken-verifier", f"The verifier is broken for the task {names}",
        tuple(f"{name}: {sign}" for name, signs in suspects.items() for sign in signs),
        "The rewards of this task do not say whether an answer is right, so the policy is trained on noise or taught to fail. "
        "Usually the task's solutions are in another form than the verifier expects, or the task goes to the wrong verifier.",
        ("Open the samples of the steps named here and compare “extracted” with the solution: the verdict's reason tells how they were "
         "compared.",
         "Check the data file's solutions: rlinf data check FILE; and grade the samples again: rlinf verify IN OUT.",
         "Leave the task out until it is fixed (data.tasks)."),
        tuple(recent[-1:]), ("rollout/verdict_undecided", "rollout/accuracy"), ("data.tasks", "reward.timeout", "reward.answer_format"),
    )  # fmt: skip


def verifier_signs(c: TaskCounts, others: Sequence[TaskCounts]) -> list[str]:
    signs = []
    if c.equal_not_right >= 5 and c.equal_not_right > 0.2 * c.equal:
        signs.append(f"{c.equal_not_right} of {c.equal} answers that are written exactly like the solution were not graded right")
    if c.right_unanswered >= 5 and c.right_unanswered > 0.2 * c.samples:
        signs.append(f"{c.right_unanswered} of {c.samples} responses were graded right although no answer was found in them")
    if c.contradictory >= 3 and c.contradictory > 0.2 * c.groups:
        signs.append(f"for {c.contradictory} of {c.groups} prompts different numbers were graded right at the same time")
    if c.undecided > 0.2 * c.samples and all(o.undecided <= 0.05 * o.samples for o in others):
        signs.append(f"{c.undecided} of {c.samples} verdicts were undecided")
    learn = [o for o in others if o.right > 0.2 * o.samples]
    if learn and len(learn) == len(others) and c.right == 0 and c.samples >= 100 and c.unanswered < 0.5 * c.samples:
        signs.append(
            f"none of {c.samples} responses was graded right, though most have an answer, while the other tasks are learned (or "
            "this one is far too hard)"
        )
    return signs


def wrong_template(run: RunData) -> Finding | None:
    """From the start, responses have no answer, and do not end, or answer prompts without the template's markers."""
    steps, unboxed = run.series("rollout/no_box")
    cut = dict(zip(*run.series("rollout/truncated")))
    if len(steps) < 3 or lost_at(unboxed) is not None:
        return None
    tail = steps[-5:]
    missing, endless = mean(unboxed[-5:]), mean(cut.get(s, 0.0) for s in tail)
    unmarked = [s for s in tail if s in run.counts and run.counts[s].groups and run.counts[s].unmarked > 0.5 * run.counts[s].groups]
    if missing <= 0.7 or (endless <= 0.7 and not unmarked):
        return None
    title = "Responses have no answer and do not end: the chat template is wrong, or the model cannot answer yet"
    evidence = [
        f"steps {tail[0]} to {tail[-1]}: no answer was found in {missing:.0%} of the responses, and {endless:.0%} were cut before "
        "they ended"
    ]
    if unmarked:
        title = f"The prompts lack the model's chat template: responses have no answer{' and do not end' if endless > 0.7 else ''}"
        markers = " ".join(run.starts[-1]["chat_markers"][:4])
        evidence.append(f"the model's chat template writes {markers}, but the prompts contain none of it")
    return Finding(
        "wrong-template", title, tuple(evidence),
        "The prompt does not look like what the model was tuned on, so it neither answers in the expected form nor writes its end token. "
        "Rewards are then the same for nearly all samples.",
        ("Read one prompt below to its end: does it close the user's turn and open the assistant's, once?",
         "If the data file has bare questions, set data.apply_chat_template: true; if its prompts carry the markers already, set it to "
         "false.",
         "Ask for \\boxed{} in the prompt.",
         "If the template is right, the responses may need more room, or the start model cannot do the format yet: raise max_new_tokens, "
         "or fine-tune first."),
        (tail[-1],), ("rollout/no_box", "rollout/truncated", "rollout/response_length"),
        ("data.apply_chat_template", "algorithm.sampling_params.max_new_tokens", "algorithm.sampling_params.stop", "reward.answer_format"),
    )  # fmt: skip


def lost_format(run: RunData) -> Finding | None:
    """Responses had answers, and no longer have any."""
    steps, unboxed = run.series("rollout/no_box")
    at = lost_at(unboxed)
    if at is None or mean(unboxed[-5:]) <= 0.5:
        return None
    fewest = min(smooth(unboxed, 5)[: at + 1])
    return Finding(
        "lost-format", f"The answer format was lost around step {steps[at]}",
        (f"before, responses without an answer were as few as {fewest:.0%}",
         f"in the last {len(unboxed[-5:])} steps no answer was found in {mean(unboxed[-5:]):.0%} of the responses"),
        "Updates pushed the policy away from a form that it had: they were too large, or the reward can be had without an answer. Once "
        "nearly no response has an answer, rewards are all the same, and nothing leads back.",
        ("Go back to a checkpoint before that step.", "Lower the learning rate, or take fewer optimizer steps a batch.",
         "Look at the gradient norm, the ratio and the response length in the steps before.",
         "If responses end before they answer, or go on behind it, raise max_new_tokens or weigh the form with reward.format_reward."),
        (steps[max(0, at - 1)], steps[at], steps[-1]),
        ("rollout/no_box", "train/grad_norm", "train/entropy_loss", "rollout/response_length"),
        ("actor.optim.lr", "algorithm.n_minibatches", "algorithm.update_epochs", "algorithm.sampling_params.max_new_tokens",
         "reward.format_reward"),
    )  # fmt: skip


def lost_at(unboxed: Sequence[float]) -> int | None:
    """The step from which more than half of the responses have no answer, after far fewer had none."""
    usual = smooth(unboxed, 5)
    return next((j for j in range(len(usual)) if usual[j] > 0.5 and usual[j] - min(usual[: j + 1]) > 0.3), None)


def stale_weights(run: RunData) -> Finding | None:
    """The engine's log-probabilities drift away from the actor's, or its versions fall behind."""
    behind = dict(zip(*run.series("rollout/staleness_max")))
    series = zip(*run.series("train/rollout_logprob_gap_mean"))
    fresh = [(s, g) for s, g in series if not behind.get(s)]  # from an earlier version a token may well be far off
    steps, gap = [s for s, _ in fresh], [g for _, g in fresh]
    fp32 = "fp32" in (run.config.get("rollout.precision"), run.config.get("actor.model.precision"))
    floor = 1e-4 if fp32 else 0.03
    lag = {s: s - 1 - c.oldest_version for s, c in run.counts.items() if c.oldest_version is not None}
    late = {s: k for s, k in lag.items() if k > run.number("algorithm.max_staleness", 0)}
    k = max(2, len(steps) // 5)
    grown = len(steps) >= 6 and median(gap[-k:]) > max(floor, 4 * median(gap[:k])) and rises(gap)
    if not grown and not late:
        return None
    evidence = [] if not grown else [
        f"the log-probability gap between actor and engine grew from {median(gap[:k]):.2g} to {median(gap[-k:]):.2g} (mean over tokens; "
        f"healthy: below {floor:g})"
    ]  # fmt: skip
    if late:
        worst = max(late, key=late.__getitem__)
        evidence.append(
            f"in {len(late)} steps tokens came from weights older than allowed; in step {worst} from version "
            f"{worst - 1 - late[worst]}, {late[worst]} behind"
        )
    elif grown and run.counts:
        evidence.append(
            "the engines say that they have the newest version: they took the version's number, but not, or not all of, its weights"
        )
    return Finding(
        "stale-weights", "Stale weights: the engine does not sample from the policy that is trained", tuple(evidence),
        "Updates do not reach the rollout engine (or only some tensors do), so training is more off-policy at every step, and the run "
        "slowly goes wrong.",
        ("Compare engine and actor at every sync: rollout.verify_weights_every: 1 stops the run at the first sync that fails.",
         "Look at sync/probe_gap_max, and at the engine's log in workers/ for weights that it skipped.",
         "Until it is fixed, importance_sampling_fix bounds the harm."),
        tuple(late)[-1:] or (steps[-1],), ("train/rollout_logprob_gap_mean", "train/rollout_logprob_gap_max", "sync/probe_gap_max"),
        ("rollout.verify_weights_every", "algorithm.importance_sampling_fix", "rollout.precision"),
    )  # fmt: skip


def no_signal(run: RunData) -> Finding | None:
    """Hardly any group has both right and wrong answers, although the advantages compare the samples of a group."""
    if run.config.get("algorithm.adv_type", "grpo") not in COMPARING:
        return None
    steps, none_right = run.series("rollout/groups_all_wrong")
    all_right = dict(zip(*run.series("rollout/groups_all_right")))
    if len(steps) < 5:
        return None
    wrong, right = mean(none_right[-5:]), mean(all_right.get(s, 0.0) for s in steps[-5:])
    if wrong + right < 0.9 or wrong < 0.5:
        return None
    return Finding(
        "no-signal", "Nothing to learn from: nearly all groups are entirely wrong",
        (f"last 5 steps: {wrong:.0%} of the groups have no right answer, {right:.0%} have only right ones",),
        "Group-relative advantages are zero when all samples of a prompt get the same reward.",
        ("Use easier problems, or a stronger start model.", "Raise algorithm.group_size, so that a right answer is found now and then."),
        tuple(steps[-1:]), ("rollout/groups_all_wrong", "rollout/advantages_zero"), ("algorithm.group_size", "data.train_data_paths"),
    )  # fmt: skip


def skipped_updates(run: RunData) -> Finding | None:
    """Mini-batches are thrown away in most recent steps."""
    steps, skipped = run.series("train/minibatches_skipped")
    recent = skipped[-WINDOW:]
    if len(recent) < 5 or sum(n > 0 for n in recent) < 0.3 * len(recent):
        return None
    return Finding(
        "skipped-updates", "Optimizer steps are being skipped",
        (f"{sum(recent):.0f} mini-batches were not stepped in steps {steps[-len(recent)]} to {steps[-1]}",),
        "The importance ratio exceeded its bound, a gradient was not finite, or no token counted.",
        ("Lower the learning rate, or take fewer mini-batches or passes a step.",
         "Look at the ratio and the log-probability gap of these steps."),
        tuple(s for s, n in zip(steps[-WINDOW:], recent) if n)[-3:], ("train/minibatches_skipped", "train/ratio", "train/grad_norm"),
        ("actor.optim.lr", "algorithm.early_stop_imp_ratio", "algorithm.n_minibatches", "algorithm.update_epochs"),
    )  # fmt: skip


def undecided_verdicts(run: RunData) -> Finding | None:
    steps, share = run.series("rollout/verdict_undecided")
    if len(steps) < 3 or mean(share[-5:]) < 0.05:
        return None
    return Finding(
        "undecided-verdicts", "Many verdicts are undecided",
        (f"{mean(share[-5:]):.1%} of the verdicts in the last {len(share[-5:])} steps",),
        "Comparisons time out or answers cannot be parsed; such answers get the reward of a wrong one unless reward.undecided_reward says "
        "otherwise.",
        ("Look at the undecided samples: the reason is with each.", "Raise reward.timeout or reward.num_processes."),
        tuple(steps[-1:]), ("rollout/verdict_undecided",), ("reward.timeout", "reward.num_processes", "reward.undecided_reward"),
    )  # fmt: skip


def not_finite(run: RunData) -> Finding | None:
    names = ("train/loss", "train/entropy_loss", "rollout/rewards")
    trained = [m for m in run.metrics if m.get("train/tokens") != 0]  # means over no token are not numbers, which is no fault of theirs
    bad = {name: int(m["step"]) for m in reversed(trained) for name in names if math.isnan(m.get(name, 0.0))}
    if not bad:
        return None
    first = min(bad.values())
    return Finding(
        "not-finite", "A loss is not a number", tuple(f"{name} at step {step}" for name, step in sorted(bad.items())),
        "An overflow, or a division by zero.",
        ("Look at the gradient norm and the ratio in the steps before.",
         "Go back to a checkpoint before the first such step and lower the learning rate."),
        (first,), ("train/loss", "train/grad_norm", "train/ratio"), ("actor.optim.lr", "actor.model.precision"),
    )  # fmt: skip


RULES = (
    stale_weights, broken_verifier, entropy_collapse, lost_format, wrong_template,
    no_signal, skipped_updates, undecided_verdicts, not_finite,
)  # fmt: skip
EXPLAINS = {
    "stale-weights": ("entropy-collapse",),  # the actor's entropy on samples of an older policy: accuracy cannot follow
    "broken-verifier": ("undecided-verdicts", "no-signal"),
    "entropy-collapse": ("lost-format", "no-signal"),  # what it is certain of need not be an answer
    "lost-format": ("no-signal",),
    "wrong-template": ("no-signal",),
}


def smooth(values: Sequence[float], width: int = 3) -> list[float]:
    """Running median, so that a single odd step is not a trend."""
    half = width // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def level(values: Sequence[float], width: int = 5) -> list[float]:
    """Running mean, for an accuracy that is a count over few prompts."""
    half = width // 2
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def rises(values: Sequence[float]) -> bool:
    """Whether later values are mostly above earlier ones (Kendall's tau above 0.5)."""
    pairs = [(a < b) - (a > b) for k, b in enumerate(values[-60:]) for a in values[-60:][:k]]
    return sum(pairs) > 0.5 * len(pairs)
