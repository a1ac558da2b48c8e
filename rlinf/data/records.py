"""The data types that all packages share, in the order in which a step makes them: prompt, sample, verdict, group, group header.

Arrays of a sample are indexed by generated token t = 0..T-1. With a prompt of P tokens, the log-probability of token t is computed from the
logits at position P+t-1 of the sequence. Log-probabilities and entropies, in engines and trainer, are of softmax(logits / temperature),
before top-p and top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np


class Finish(str, Enum):
    """Why a sample ended."""

    STOP = "stop"  # end token or stop string; the ending token belongs to the sample
    LENGTH = "length"  # max_new_tokens reached
    ABORT = "abort"  # aborted from outside; the tokens decoded so far are kept
    WINDOW = "window"  # the engine's context window is full

    @property
    def cut_off(self) -> bool:
        """Whether the model was stopped by a length limit, before it ended the answer itself."""
        return self in (Finish.LENGTH, Finish.WINDOW)


class Status(str, Enum):
    """What the verifier says about an answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"  # time-out, unparsable, resource limit: never silently counted as wrong


@dataclass(frozen=True)
class Prompt:
    """One problem.

    token_ids    [P] int32, exactly as engine and trainer see it (with one BOS where the model has one)
    task         how answers are judged
    solutions    the accepted answers
    source       the data file it is from, by a short name
    metadata     what else the data says of it, a JSON value, for functions of the user's own
    """

    prompt_id: str
    token_ids: np.ndarray
    task: str
    solutions: tuple[str, ...]
    text: str = ""
    source: str = ""
    metadata: Any = None

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or self.token_ids.size == 0:
            raise ValueError(f"prompt {self.prompt_id}: token_ids must be a non-empty vector")
        if not self.solutions:
            raise ValueError(f"prompt {self.prompt_id}: no solutions")


@dataclass(frozen=True)
class Sample:
    """One generated response.

    token_ids        [T] int32, generated tokens only
    rollout_logprobs [T] float32, NaN where the token was not sampled by the policy
    loss_mask        [T] uint8, 1 = sampled by the policy; tool or environment tokens are 0
    versions         ((weight_version, n_tokens), ...) in order of generation; the counts sum to T
    """

    sample_id: str
    token_ids: np.ndarray
    rollout_logprobs: np.ndarray
    loss_mask: np.ndarray
    versions: tuple[tuple[int, int], ...]
    finish: Finish

    def __post_init__(self) -> None:
        t = len(self.token_ids)
        if len(self.rollout_logprobs) != t or len(self.loss_mask) != t:
            raise ValueError(
                f"sample {self.sample_id}: {t} tokens, {len(self.rollout_logprobs)} logprobs, {len(self.loss_mask)} mask entries"
            )
        if sum(n for _, n in self.versions) != t:
            raise ValueError(f"sample {self.sample_id}: versions {self.versions} do not cover {t} tokens")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def token_versions(self) -> np.ndarray:
        """[T] int64: the version of the weights that generated each token."""
        return np.repeat([v for v, _ in self.versions], [n for _, n in self.versions]).astype(np.int64)

    def continued_by(self, rest: Sample) -> Sample:
        """This sample and what was generated after it, as one; every token keeps its version and its log-probability."""
        if rest.sample_id != self.sample_id:
            raise ValueError(f"sample {self.sample_id} is not continued by {rest.sample_id}")
        versions = list(self.versions)
        for version, n in rest.versions:
            if versions and versions[-1][0] == version:
                versions[-1] = (version, versions[-1][1] + n)
            else:
                versions.append((version, n))
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, rest.token_ids]),
            rollout_logprobs=np.concatenate([self.rollout_logprobs, rest.rollout_logprobs]),
            loss_mask=np.concatenate([self.loss_mask, rest.loss_mask]),
            versions=tuple(versions),
            finish=rest.finish,
        )


@dataclass(frozen=True)
class Verdict:
    """The judgement of one answer.

    reward       already scaled, with all its parts
    extracted    the answer that was found in the text; None = there is none
    route        which rule of the verifier decided
    parts        what was added to the reward for correctness, as ((name, value), ...): format, overlong, exploration, the user's own parts
    failed       the user's own parts that gave no number, and so count as 0, as ((name, why), ...)
    """

    reward: float
    status: Status
    extracted: str | None
    route: str
    seconds: float
    reason: str = ""
    parts: tuple[tuple[str, float], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Group:
    """The samples of one prompt: the unit of GRPO, of a worker call and of filtering. It is the payload, which the driver never opens.

    May be incomplete (fewer samples than group_size); a verdict may still be None.
    """

    group_id: str
    prompt: Prompt
    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict | None, ...] = ()

    def __post_init__(self) -> None:
        if self.verdicts and len(self.verdicts) != len(self.samples):
            raise ValueError(f"group {self.group_id}: {len(self.samples)} samples, {len(self.verdicts)} verdicts")

    def header(self) -> GroupHeader:
        return GroupHeader(
            group_id=self.group_id,
            prompt_id=self.prompt.prompt_id,
            task=self.prompt.task,
            prompt_length=len(self.prompt.token_ids),
            sample_ids=tuple(s.sample_id for s in self.samples),
            response_lengths=tuple(len(s) for s in self.samples),
            loss_tokens=tuple(int(s.loss_mask.sum()) for s in self.samples),
            finishes=tuple(s.finish for s in self.samples),
            versions=tuple(s.versions for s in self.samples),
            verdicts=self.verdicts or (None,) * len(self.samples),
        )


@dataclass(frozen=True)
class GroupHeader:
    """What the driver sees of a group: ids, lengths, versions and verdicts, but no tokens."""

    group_id: str
    prompt_id: str
    task: str
    prompt_length: int
    sample_ids: tuple[str, ...]
    response_lengths: tuple[int, ...]
    loss_tokens: tuple[int, ...]
    finishes: tuple[Finish, ...]
    versions: tuple[tuple[tuple[int, int], ...], ...]
    verdicts: tuple[Verdict | None, ...]

    @property
    def judged(self) -> tuple[Verdict, ...]:
        """The verdicts; raises ValueError if a sample has none yet."""
        found = tuple(v for v in self.verdicts if v is not None)
        if len(found) < len(self.sample_ids):
            missing = [i for i, v in zip(self.sample_ids, self.verdicts) if v is None]
            raise ValueError(f"group {self.group_id}: no verdict yet for {missing[:3]}")
        return found

    def with_verdicts(self, verdicts: tuple[Verdict, ...]) -> GroupHeader:
        if len(verdicts) != len(self.sample_ids):
            raise ValueError(f"group {self.group_id}: {len(self.sample_ids)} samples, {len(verdicts)} verdicts")
        return replace(self, verdicts=verdicts)

    @property
    def rewards(self) -> tuple[float, ...]:
        """Scaled rewards; raises ValueError if a sample has no verdict yet."""
        return tuple(v.reward for v in self.judged)

    @property
    def right(self) -> tuple[bool, ...]:
        """Which answers are right, whatever their shaped rewards are."""
        return tuple(v is not None and v.status is Status.RIGHT for v in self.verdicts)


def sample_id(group_id: str, index: int) -> str:
    """The id of the index-th sample of a group; the sampling noise of the embedded engine is keyed by it."""
    return f"{group_id}/{index}"
