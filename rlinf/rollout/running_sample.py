"""One sample on its way through the embedded engine: its tokens so far, and why and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rlinf.data.records import Finish, Sample
from rlinf.rollout.contract import Decode, GenerateRequest, completes_string


@dataclass(eq=False)
class Job:
    """One request inside the engine. unfinished: how many of its samples are still to be delivered."""

    request: GenerateRequest
    unfinished: int


@dataclass(eq=False)
class RunningSample:
    """A sample that is being generated.

    context: prompt + prefix + new tokens. given: how many of them came with the request (prompt and prefix).
    row: the slot in which it runs; None = it waits. filled: for how many tokens of the context keys and values are in the slot.
    """

    job: Job
    sample_id: str
    context: list[int]
    given: int
    prompt_length: int
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    row: int | None = None
    filled: int = 0

    @property
    def prefilling(self) -> bool:
        """Whether keys and values of more than the last token are missing; otherwise the next step can decode."""
        return self.filled < len(self.context) - 1

    @property
    def generated(self) -> int:
        """Tokens after the prompt, including the prefix: the position by which the noise of the next token is chosen."""
        return len(self.context) - self.prompt_length

    def append(self, token: int, logprob: float, version: int) -> None:
        self.context.append(token)
        self.logprobs.append(logprob)
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1][1] += 1
        else:
            self.versions.append([version, 1])

    def finish(self, max_context: int, decode: Decode | None) -> Finish | None:
        """Why the sample ends with its last token, or None."""
        request = self.job.request
        if self.context[-1] in request.stop.token_ids or (request.stop.strings and self._completes_string(decode)):
            return Finish.STOP
        if self.generated >= request.max_new_tokens:
            return Finish.LENGTH
        return Finish.WINDOW if len(self.context) >= max_context else None

    def ended(self, finish: Finish) -> Sample:
        tokens = np.array(self.context[self.given :], dtype=np.int32)
        return Sample(
            sample_id=self.sample_id,
            token_ids=tokens,
            rollout_logprobs=np.array(self.logprobs, dtype=np.float32),
            loss_mask=np.ones(len(tokens), dtype=np.uint8),
            versions=tuple((v, n) for v, n in self.versions),
            finish=finish,
        )

    def _completes_string(self, decode: Decode | None) -> bool:
        if decode is None:
            raise ValueError(f"request {self.job.request.request_id}: stop strings need an engine with a tokenizer")
        return completes_string(self.job.request.stop, self.context, self.prompt_length, decode)


def running_samples(job: Job) -> list[RunningSample]:
    """The n samples of a request."""
    request = job.request
    prompt = request.prompt_ids.tolist()
    prefixes = [p.tolist() for p in request.prefixes] or [[]] * request.n
    return [
        RunningSample(job, name, prompt + p, len(prompt) + len(p), len(prompt))
        for name, p in zip(request.sample_ids, prefixes, strict=True)
    ]
