"""A request on its way through the SGLang server: what is asked for, and the samples as their tokens arrive."""

from __future__ import annotations

import hashlib
import secrets
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlinf.data.records import Finish, Sample
from rlinf.rollout.contract import Decode, GenerateRequest

STREAM_INTERVAL = 16  # tokens of a sample in one event: what is lost when the server dies, against work for every event


@dataclass(eq=False)
class Arriving:
    """One sample. rid is its name in the server, which aborts by the beginning of a name, so no name begins another."""

    sample_id: str
    input_ids: list[int]
    room: int
    limited_by_window: bool
    rid: str = field(default_factory=lambda: secrets.token_hex(16))
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    cached_tokens: int = 0
    finish: Finish | None = None
    unwanted: bool = False  # aborted, perhaps before it began
    version: int = 0  # of the weights when it was sent
    certain: int | None = None  # how many of its first tokens are surely of that version; None: all, since no others have come

    def cut_short(self) -> None:
        """The server is dead.

        Its tokens are kept as far as it is known which weights decoded them: the server says so only with the last one.
        """
        self.finish = Finish.ABORT
        self.token_ids, self.logprobs = self.token_ids[: self.certain], self.logprobs[: self.certain]
        self.spans = [{"version": self.version, "start": 0, "end": len(self.token_ids)}]

    def expect_other_weights(self) -> None:
        """The server stands still, and is about to be given others."""
        if self.certain is None:
            self.certain = len(self.token_ids)

    def take(self, event: dict[str, Any]) -> int:
        """The tokens of one event; how many are new. An event of an aborted sample repeats tokens: the count tells.

        Raises RuntimeError when the server ended the sample for a reason of its own, such as memory, or before it had all
        the tokens that it may have.
        """
        meta = event["meta_info"]
        new = meta["completion_tokens"] - len(self.token_ids)
        if new:
            self.token_ids += event["output_ids"][-new:]
            self.logprobs += [logprob for logprob, *_ in meta["output_token_logprobs"][-new:]]
        if len(self.token_ids) != meta["completion_tokens"] or len(self.logprobs) != len(self.token_ids):
            raise RuntimeError(f"sample {self.sample_id}: {len(self.token_ids)} tokens and {len(self.logprobs)} log-probabilities arrived "
                               f"of {meta['completion_tokens']}")  # fmt: skip
        reason = meta["finish_reason"]
        if reason is not None:
            if reason.get("status_code"):
                raise RuntimeError(f"sample {self.sample_id}: SGLang gave up: {reason['message']}")
            if reason["type"] == "length" and len(self.token_ids) < self.room:
                raise RuntimeError(f"sample {self.sample_id}: SGLang ended it after {len(self.token_ids)} of {self.room} tokens")
            limit = Finish.WINDOW if self.limited_by_window else Finish.LENGTH
            self.finish = {"stop": Finish.STOP, "length": limit, "abort": Finish.ABORT}[reason["type"]]
            self.spans = meta.get("weight_versions", [])
            self.cached_tokens = min(meta.get("cached_tokens", 0), len(self.input_ids))
        return new

    def look_again(self, request: GenerateRequest, decode: Decode | None) -> None:
        """Find an end that SGLang has not seen: going on would decode past it.

        It seeks a stop string in no token of the prefix, and in no more of those that follow than its tokenizer writes the string with, and
        one. Of an aborted sample it decodes one more token and does not look whether that was the last.
        """
        end = self._end_of_string(request, decode) if decode and request.stop.strings and self.token_ids else None
        if end is not None:
            self.finish = Finish.STOP
            self.token_ids, self.logprobs = self.token_ids[:end], self.logprobs[:end]
            self.spans = [span | {"end": min(span["end"], end)} for span in self.spans]
        elif self.finish is Finish.ABORT and self.token_ids:
            if self.token_ids[-1] in request.stop.token_ids:
                self.finish = Finish.STOP
            elif len(self.token_ids) >= self.room:
                self.finish = Finish.WINDOW if self.limited_by_window else Finish.LENGTH

    def _end_of_string(self, request: GenerateRequest, decode: Decode) -> int | None:
        """How many tokens there are when the first stop string is complete; None when none is."""
        prefix, n = self.input_ids[len(request.prompt_ids) :], len(self.token_ids)

        def complete(tokens: int) -> bool:
            text = decode(prefix + self.token_ids[:tokens])
            return any(string in text for string in request.stop.strings)

        if not complete(n):
            return None
        return 1 + bisect_left(range(1, n), True, key=complete) if complete(n - 1) else n  # most end where SGLang has ended them

    def sample(self) -> Sample:
        n = len(self.token_ids)
        versions = tuple((int(s["version"]), s["end"] - s["start"]) for s in self.spans if s["end"] > s["start"])
        logprobs = np.array(self.logprobs, np.float32)
        return Sample(
            self.sample_id, np.array(self.token_ids, np.int32), logprobs, np.ones(n, np.uint8), versions, self.finish or Finish.ABORT
        )


def arriving(request: GenerateRequest, max_context: int) -> list[Arriving]:
    """The n samples of a request, nothing of them there yet."""
    prompt = request.prompt_ids.tolist()
    samples = []
    for k, name in enumerate(request.sample_ids):
        prefix = request.prefixes[k].tolist() if request.prefixes else []
        window, room = max_context - len(prompt) - len(prefix), request.max_new_tokens - len(prefix)
        samples.append(Arriving(name, prompt + prefix, min(room, window), window < room))
    return samples


def body_of(request: GenerateRequest, samples: list[Arriving], seed: int | None, vocab: int) -> dict[str, Any]:
    """/generate for these samples. seed: of a server with deterministic inference.

    A top-k of the whole vocabulary (the default of a run) goes as none: SGLang would look for those k at each step, on a GPU by a kernel of
    its own, else by sorting the vocabulary, and by sums whose rounding loses the least likely tokens.

    SGLang either ignores all end tokens or honours the model's own besides those asked for; so a request without stop tokens ignores
    them, and one with stop tokens also ends at the model's.
    """
    s = request.sampling
    common = {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k if 0 < s.top_k < vocab else -1,
        "ignore_eos": not request.stop.token_ids,
        "stop_token_ids": list(request.stop.token_ids),
        "stop": list(request.stop.strings),
        "stream_interval": STREAM_INTERVAL,
    }
    each = [
        common | {"max_new_tokens": a.room} | ({} if seed is None else {"sampling_seed": noise_seed(seed, a.sample_id)}) for a in samples
    ]
    return {
        "input_ids": [a.input_ids for a in samples],
        "rid": [a.rid for a in samples],
        "sampling_params": each,
        "return_logprob": True,
        "stream": True,
    }


def noise_seed(seed: int, sample: str) -> int:
    """The seed of one sample; SGLang adds the position of each token."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{sample}".encode(), digest_size=8).digest(), "little") >> 2
