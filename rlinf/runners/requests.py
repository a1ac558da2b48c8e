"""The groups that the loop asks the engines for: their names, and their sampling parameters from the `algorithm` section."""

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
    """A group to be generated: n samples of a prompt.

    dump: the file to which its samples are written, for people to read. timer: the phase under which its seconds are counted.
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
    """A group for each prompt. taken: how often `step` has taken each prompt so far; this function updates it."""
    sampling = sampling_of(algorithm)
    return [GroupRequest(name, p, algorithm.group_size, sampling, dump) for name, p in zip(name_groups(step, prompts, taken), prompts)]


def validation_requests(step: int, prompts: Sequence[Prompt], dump: str) -> list[GroupRequest]:
    """One greedy answer to each problem. Names begin with `val.`: a training group of the same prompt may be in flight at the same time."""
    names = name_groups(step, prompts, Counter())
    return [GroupRequest(f"val.{name}", p, 1, validation_sampling(), dump, "validate") for name, p in zip(names, prompts)]


def name_groups(step: int, prompts: Sequence[Prompt], taken: Counter[str]) -> list[str]:
    """Names of the form `step.prompt`. When a step takes a prompt again, after the end of an epoch, `.1`, `.2` and so on is added: the
    sampling noise and the payload of a group depend on its name.

    taken: how often the step has taken each prompt so far; this function updates it.
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
    """Validation in the loop is greedy: one answer to each of the same problems every time, so that two steps can be compared in pairs."""
    return SamplingParams(temperature=0.0)


def stop_of(algorithm: AlgorithmConfig, tokenizer: TextTokenizer) -> Stop:
    return Stop(token_ids=tuple(tokenizer.eos_token_ids), strings=tuple(algorithm.sampling_params.stop))
