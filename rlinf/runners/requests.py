"""Which groups the loop asks of the engines, and what it asks of them by the `algorithm` section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlinf.config.schema import AlgorithmConfig
from rlinf.data.records import Prompt
from rlinf.data.tokenizer import TextTokenizer
from rlinf.rollout.contract import SamplingParams, Stop


@dataclass(frozen=True)
class GroupRequest:
    """A group that is wanted: n samples of a prompt.

    dump: the file that its samples are written to, for people to read. timer: the phase of the loop that its seconds belong to.
    """

    name: str
    prompt: Prompt
    n: int
    sampling: SamplingParams
    dump: str
    timer: str = "rollout"

    @property
    def described(self) -> str:
        return f"samples {self.name}/0 to {self.n - 1}"


def training_requests(
    algorithm: AlgorithmConfig, step: int, prompts: Sequence[Prompt], taken: Counter[str], dump: str
) -> list[GroupRequest]:
    """A group of each prompt for `step`. taken: how often the step has taken each prompt; updated."""
    sampling = sampling_of(algorithm)
    return [GroupRequest(name, p, algorithm.group_size, sampling, dump) for name, p in zip(name_groups(step, prompts, taken), prompts)]


def validation_requests(step: int, prompts: Sequence[Prompt], dump: str) -> list[GroupRequest]:
    """One greedy answer a problem. No training group has such a name: one of the same prompt id may be carried over meanwhile."""
    names = name_groups(step, prompts, Counter())
    return [GroupRequest(f"val.{name}", p, 1, validation_sampling(), dump, "validate") for name, p in zip(names, prompts)]


def name_groups(step: int, prompts: Sequence[Prompt], taken: Counter[str]) -> list[str]:
    """`step.prompt`. A prompt that a step takes again, behind the end of an epoch, gets another name, and with it other noise and payload.

    taken: how often the step has taken each prompt; updated.
    """
    names = []
    for prompt in prompts:
        again = taken[prompt.prompt_id]
        names.append(f"{step}.{prompt.prompt_id}" + (f".{again}" if again else ""))
        taken[prompt.prompt_id] += 1
    return names


def sampling_of(algorithm: AlgorithmConfig) -> SamplingParams:
    s = algorithm.sampling_params
    return SamplingParams(s.temperature, s.top_p, s.top_k)


def validation_sampling() -> SamplingParams:
    """Validation in the loop is greedy: one answer a problem, the same problems every time, so that two steps compare in pairs."""
    return SamplingParams(temperature=0.0)


def stop_of(algorithm: AlgorithmConfig, tokenizer: TextTokenizer) -> Stop:
    return Stop(token_ids=tuple(tokenizer.eos_token_ids), strings=tuple(algorithm.sampling_params.stop))
