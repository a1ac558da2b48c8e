"""The groups that the loop asks the engines for: their names and sizes, and how they are sampled (`algorithm`, `validation`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.benchmarks import ValidationConfig
from rlinf.data.records import Prompt
from rlinf.data.tokenizer import TextTokenizer
from rlinf.rollout.contract import SamplingParams, Stop


@dataclass(frozen=True)
class GroupRequest:
    """A group to be generated: n samples of a prompt, each of at most max_new_tokens.

    dump: by the rank of the reward worker that judges it, the file to which that worker writes its samples. timer: the phase under which
    its seconds are counted.
    """

    name: str
    prompt: Prompt
    n: int
    sampling: SamplingParams
    stop: Stop
    max_new_tokens: int
    dump: Callable[[int], str]
    timer: str = "rollout"

    @property
    def described(self) -> str:
        return f"samples {self.name}/0 to {self.n - 1}"


def training_requests(
    algorithm: AlgorithmConfig, stop: Stop, step: int, prompts: Sequence[Prompt], taken: Counter[str], dump: str
) -> list[GroupRequest]:
    """A group for each prompt. taken: how often `step` has taken each prompt so far; this function updates it."""
    s = algorithm.sampling_params
    wanted = algorithm.group_size, SamplingParams(s.temperature, s.top_p, s.top_k), stop, s.max_new_tokens, lambda _: dump
    return [GroupRequest(name, p, *wanted) for name, p in zip(name_groups(step, prompts, taken), prompts)]


def validation_requests(
    wanted: ValidationConfig, algorithm: AlgorithmConfig, stop: Stop, step: int, prompts: Sequence[Prompt], dump: str
) -> list[GroupRequest]:
    """wanted.n answers to each problem, in groups no larger than those of training, so that they spread over the engines. All first groups
    come in the order of `prompts`, then all second ones.

    Names begin with `val.`, `val1.` and so on: a training group of the same prompt may be in flight at the same time.
    """
    sampling, longest = SamplingParams(wanted.temperature, wanted.top_p, wanted.top_k), algorithm.sampling_params.max_new_tokens
    names, whole = name_groups(step, prompts, Counter()), range(0, wanted.n, algorithm.group_size)
    return [
        GroupRequest(
            f"val{k or ''}.{name}",
            p,
            min(algorithm.group_size, wanted.n - begin),
            sampling,
            stop,
            wanted.max_new_tokens or longest,
            lambda _: dump,
            "validate",
        )
        for k, begin in enumerate(whole)
        for name, p in zip(names, prompts)
    ]


def name_groups(step: int, prompts: Sequence[Prompt], taken: Counter[str]) -> list[str]:
    """Names of the form `step.prompt`. When a step takes a prompt again, after the end of an epoch, `@again:1`, `@again:2` and so on is
    added: the sampling noise and the payload of a group depend on its name. (`.1` would do unless another prompt is called so.)

    taken: how often the step has taken each prompt so far; this function updates it.
    """
    names = []
    for prompt in prompts:
        again = taken[prompt.prompt_id]
        names.append(f"{step}.{prompt.prompt_id}" + (f"@again:{again}" if again else ""))
        taken[prompt.prompt_id] += 1
    return names


def stop_of(algorithm: AlgorithmConfig, tokenizer: TextTokenizer) -> Stop:
    return Stop(token_ids=tuple(tokenizer.eos_token_ids), strings=tuple(algorithm.sampling_params.stop))
