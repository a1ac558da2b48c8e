"""Run folders as runs leave them, made through the writers of real runs: a healthy one, and four that went bad for a known reason."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlinf.algorithms.advantages import outcome_advantages
from rlinf.config.load import load
from rlinf.data.lines import append_lines
from rlinf.data.records import Finish, Group, GroupHeader, Prompt, Sample, Status, Verdict
from rlinf.data.token_values import TokenValues, plan_dump
from rlinf.launch.environment import record_environment
from rlinf.metrics.logger import MetricLogger
from rlinf.run_folder.folder import RunFolder
from rlinf.runners.step_metrics import advantage_metrics, rollout_metrics
from rlinf.scheduling.placement import Node
from rlinf.workers.reward import dump

TASKS = ("math", "counting")
MARKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Template:
    """Stands for a tokenizer whose chat template writes two special tokens."""

    def chat_markers(self) -> list[str]:
        return ["<|im_end|>", "<|im_start|>"]


@dataclass(frozen=True)
class Answer:
    text: str
    extracted: str | None
    status: Status
    finish: Finish = Finish.STOP


def solve(solution: int, skill: float, rng: random.Random) -> Answer:
    right = rng.random() < skill
    value = solution if right else solution + rng.randint(1, 9)
    return Answer(f"{'so ' * rng.randint(1, 6)}it is \\boxed{{{value}}}", str(value), Status.RIGHT if right else Status.WRONG)


@dataclass(frozen=True)
class Behaviour:
    """How a run goes: what the policy answers, and the curves that only training sees."""

    answer: Callable[[int, str, int, random.Random], Answer]
    entropy: Callable[[int], float] = lambda step: 0.55 - 0.008 * min(step, 30)
    gap: Callable[[int], float] = lambda step: 0.012
    version: Callable[[int], int] = lambda step: step - 1
    prompt: str = MARKED


def skill(step: int) -> float:
    return min(0.9, 0.15 + 0.03 * step)


def collapsed(step: int, task: str, solution: int, rng: random.Random) -> Answer:
    return solve(solution, skill(step), rng) if step < 8 else Answer("it is \\boxed{0}", "0", Status.WRONG)


def misjudged(step: int, task: str, solution: int, rng: random.Random) -> Answer:
    answer = solve(solution, skill(step), rng)
    return Answer(answer.text, answer.extracted, Status.WRONG, answer.finish) if task == "counting" else answer


def endless(step: int, task: str, solution: int, rng: random.Random) -> Answer:
    return Answer("and so on " * 8, None, Status.WRONG, Finish.LENGTH)


HEALTHY = Behaviour(lambda step, task, solution, rng: solve(solution, skill(step), rng))
BEHAVIOURS = {
    "entropy-collapse": Behaviour(collapsed, entropy=lambda step: 0.55 if step < 8 else max(0.004, 0.55 * 0.6 ** (step - 7))),
    "broken-verifier": Behaviour(misjudged),
    "wrong-template": Behaviour(endless, prompt="{}"),
    "stale-weights": Behaviour(HEALTHY.answer, gap=lambda step: 0.012 + 0.01 * step),
}


def make_run(
    folder: Path, behaviour: Behaviour, steps: int = 30, prompts: int = 8, group_size: int = 4, words: int = 0, seed: int = 0
) -> Path:
    """words: extra words in every response."""
    config = folder / "run.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(
        f"runner:\n  output_dir: {folder}\n  experiment_name: run\n"
        f"rollout:\n  model_dir: {folder / 'model'}\n"
        "actor:\n  optim:\n    lr: 1.0e-6\n"
    )
    run = RunFolder(load(str(config)))
    run.begin()
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    record_environment(run.path, "run-1", 1, [Node(0, 1)], Template(), str(model), "0")
    logger = MetricLogger(run.path, [], None)
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        groups = [make_group(step, k, behaviour, group_size, words, rng) for k in range(prompts)]
        headers = [write_samples(run, step, group, answers) for group, answers in groups]
        advantages = outcome_advantages([h.rewards for h in headers], [h.loss_tokens for h in headers], "grpo", True)
        gaps = write_tokens(run, step, [g for g, _ in groups], headers, advantages, behaviour.gap(step) * rng.uniform(0.8, 1.2))
        train = {
            "train/loss": 1e-9, "train/entropy_loss": behaviour.entropy(step) * rng.uniform(0.9, 1.1), "train/ratio": 1.0,
            "train/clip_fraction": 0.0, "train/approx_kl": 0.0, "train/rollout_logprob_gap_mean": gaps[0],
            "train/rollout_logprob_gap_max": gaps[1], "train/grad_norm": rng.uniform(0.5, 2), "train/minibatches_skipped": 0.0,
            "train/lr": 1e-6,
        }  # fmt: skip
        times = {
            "time/rollout": rng.uniform(3, 4),
            "time/train": rng.uniform(5, 6),
            "time/forward_backward": 4.5,
            "time/sync_weights": 0.4,
            "time/step": 11.0,
        }
        logger.log(
            step,
            rollout_metrics(headers)
            | advantage_metrics(advantages, [np.ones(len(a), bool) for a in advantages], run.config)
            | train
            | times
            | {"perf/tokens_per_second": rng.uniform(500, 600), "perf/actor_memory_gib": 4.0},
        )
    logger.close()
    return run.path


def make_group(step: int, k: int, behaviour: Behaviour, size: int, words: int, rng: random.Random) -> tuple[Group, list[Answer]]:
    task, left, right = TASKS[k % len(TASKS)], rng.randint(10, 99), rng.randint(10, 99)
    answers = [behaviour.answer(step, task, left + right, rng) for _ in range(size)]
    answers = (
        [Answer(" ".join([*rng.choices(WORDS, k=words), a.text]), a.extracted, a.status, a.finish) for a in answers] if words else answers
    )
    version, name = behaviour.version(step), f"{step}.{task}-{k}"
    samples = []
    for i, answer in enumerate(answers):
        n = len(pieces(answer.text))
        samples.append(
            Sample(f"{name}/{i}", np.zeros(n, np.int32), np.zeros(n, np.float32), np.ones(n, np.uint8), ((version, n),), answer.finish)
        )
    prompt = Prompt(
        f"{task}-{k}", np.zeros(5, np.int32), task, (f"\\boxed{{{left + right}}}",), behaviour.prompt.format(f"What is {left}+{right}?")
    )
    return Group(name, prompt, tuple(samples)), answers


def write_samples(run: RunFolder, step: int, group: Group, answers: list[Answer]) -> GroupHeader:
    verdicts = tuple(
        Verdict(
            5.0 if a.status is Status.RIGHT else -5.0,
            a.status,
            a.extracted,
            "number" if a.extracted else "no_answer",
            1e-5,
            f"{a.extracted} against {group.prompt.solutions[0]}",
        )
        for a in answers
    )
    dump(run.paths.samples(step), group, group.prompt.text, [a.text for a in answers], verdicts)
    return group.header().with_verdicts(verdicts)


def write_tokens(
    run: RunFolder, step: int, groups: list[Group], headers: list[GroupHeader], advantages: list[np.ndarray], gap: float
) -> tuple[float, float]:
    """(mean, largest) gap."""
    plan = plan_dump(str(run.paths.tokens(step)), headers, advantages, [np.ones(len(a), bool) for a in advantages], (0, step))
    texts = {row["sample_id"]: row["response"] for row in read(run.paths.samples(step))}
    noise = np.random.default_rng(step)
    lines, every = [], []
    for group, advantage in zip(groups, advantages):
        for sample, a in zip(group.samples, advantage):
            values = TokenValues(
                sample.sample_id, np.full(len(sample), a), noise.normal(0, 0.02, len(sample)), noise.laplace(0, gap, len(sample))
            )
            every.append(np.abs(values.gaps))
            lines.append(values.line(pieces(texts[sample.sample_id]) if sample.sample_id in plan.sample_ids else None))
    append_lines(Path(plan.path), lines)
    flat = np.concatenate(every)
    return float(flat.mean()), float(flat.max())


def pieces(text: str) -> list[str]:
    return [" " * (i > 0) + word for i, word in enumerate(text.split(" "))]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


WORDS = "we add the two numbers and carry one to the next place then check the sum again by taking away what was added first".split()
