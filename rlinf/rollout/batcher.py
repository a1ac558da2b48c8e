"""Continuous batching for the embedded engine: which samples run in which slots, and what one step computes. Synchronous, on one thread.

A step either prefills contexts or decodes one token of every slot. Prefill comes first, because decoding is efficient only with full slots.
A context is prefilled once; samples that share it, or its first tokens, start from a copy of its keys and values.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rlinf.data.records import Finish, Sample
from rlinf.rollout.attention import Span, causal_attention, decode_attention, prefill_attention
from rlinf.rollout.contract import Counters
from rlinf.rollout.embedded_model import EmbeddedModel
from rlinf.rollout.linear import LEAST_ROWS
from rlinf.rollout.running_sample import Decode, Job, RunningSample, running_samples
from rlinf.rollout.sampling import draw, uniform
from rlinf.rollout.slot_cache import MINIMUM_REUSE, CachedPrompt, PrefixCache, SlotCache, common_prefix

PREFILL_TOKENS = 2048  # padded tokens of one prefill step
PREFILL_CHUNK = 512  # tokens of one context in one prefill step
PREFIX_TOKENS_PER_SLOT = 128  # tokens in the prefix store for each slot
SEQUENCE_TOKENS = 1024  # padded tokens of one pass over given sequences
LOGIT_ELEMENTS = 2**25  # float32 logits at a time (128 MiB)

Outcome = tuple[Job, Sample]


class Batcher:
    """Slots, queue and caches around one model."""

    def __init__(self, model: EmbeddedModel, slots: int, max_context: int, seed: int, decode: Decode | None) -> None:
        self.model = model
        self.version = 0
        self.counters = Counters()
        self._max_context = max_context
        self._seed = seed
        self._decode_text = decode
        self._slots = SlotCache(model.arch, slots, max_context, model.dtype, model.device)
        self._prefixes = PrefixCache(slots * PREFIX_TOKENS_PER_SLOT)
        self._rows: list[RunningSample | None] = [None] * slots
        self._waiting: deque[RunningSample] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(s is not None for s in self._rows)

    def submit(self, job: Job) -> None:
        self._waiting.extend(running_samples(job))

    def abort(self, chosen: Callable[[Job], bool]) -> list[Outcome]:
        """End the samples of the chosen jobs with what they have."""
        ended = [s for s in (*self._rows, *self._waiting) if s is not None and chosen(s.job)]
        self._waiting = deque(s for s in self._waiting if not chosen(s.job))
        return [self._end(sample, Finish.ABORT) for sample in ended]

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int, keep: bool = False) -> tuple[int, int]:
        """Load weights. Running samples go back to the queue; their keys and values are computed anew. Returns (tensors, bytes)."""
        loaded = self.model.load(tensors, keep)
        self.version = version
        self.retract()
        return loaded

    def retract(self) -> None:
        """Forget all keys and values; running samples keep their tokens and go back to the queue, in their order."""
        running = [s for s in self._rows if s is not None]
        for sample in running:
            sample.row, sample.filled = None, 0
        self._waiting.extendleft(reversed(running))
        self._rows = [None] * len(self._rows)
        self._prefixes.clear()

    def free_cache(self) -> None:
        self.retract()
        self._slots.free()

    def step(self) -> list[Outcome]:
        """One prefill or decode pass; the samples that ended with it."""
        start = time.perf_counter()
        ready = self._admit()
        if not ready:
            ready = self._prefill()
        if ready:
            outcomes = self._choose([s for s, _ in ready], torch.stack([h for _, h in ready]))
        elif any(s is not None and s.prefilling for s in self._rows):
            outcomes = []  # a long context is only partly prefilled
        else:
            outcomes = self._decode()
        self.counters.add(busy_seconds=time.perf_counter() - start)
        return outcomes

    def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token given those before it."""
        found: dict[int, np.ndarray] = {}
        batch: list[int] = []
        for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
            if batch and (len(batch) + 1) * len(sequences[i]) > SEQUENCE_TOKENS:
                found |= self._batch_logprobs(sequences, batch)
                batch = []
            batch.append(i)
        if batch:
            found |= self._batch_logprobs(sequences, batch)
        return [found[i] for i in range(len(sequences))]

    def _admit(self) -> list[tuple[RunningSample, Tensor]]:
        """Give free slots to waiting samples, in order. Returns those whose whole context is in the prefix store, with its hidden state.

        A sample that shares more tokens with a context that is being prefilled now than with the store waits until that one is done.
        """
        free = deque(row for row, s in enumerate(self._rows) if s is None)
        if not free or not self._waiting:
            return []
        self._slots.reserve(max(len(s.context) for s in list(self._waiting)[: len(free)]) + 1)
        leaders = [np.array(s.context, dtype=np.int32) for s in self._rows if s is not None and s.prefilling]
        in_flight = {leader.tobytes() for leader in leaders}
        hits: dict[int, tuple[CachedPrompt, list[tuple[int, RunningSample]]]] = {}
        passed: deque[RunningSample] = deque()
        budget = 4 * len(self._rows)  # how far ahead to look
        while free and self._waiting and budget:
            budget -= 1
            sample = self._waiting.popleft()
            tokens = np.array(sample.context, dtype=np.int32)
            entry = self._prefixes.whole(tokens)
            if entry is not None:
                row = self._seat(sample, free.popleft(), len(tokens))
                hits.setdefault(id(entry), (entry, []))[1].append((row, sample))
                continue
            shared, entry = self._prefixes.longest(tokens)
            shared = min(shared, max(0, len(tokens) - LEAST_ROWS))
            if tokens.tobytes() in in_flight or any(common_prefix(tokens, leader) >= shared + MINIMUM_REUSE for leader in leaders):
                passed.append(sample)
                continue
            row = self._seat(sample, free.popleft(), shared)
            if entry is not None:
                self._slots.restore([row], entry.kv, shared)
                self.counters.add(reused_tokens=shared)
            leaders.append(tokens)
            in_flight.add(tokens.tobytes())
        self._waiting.extendleft(reversed(passed))
        for entry, group in hits.values():
            self._slots.restore([row for row, _ in group], entry.kv, len(entry.token_ids))
            self.counters.add(reused_tokens=len(entry.token_ids) * len(group))
        return [(sample, entry.last_hidden) for entry, group in hits.values() for _, sample in group]

    def _seat(self, sample: RunningSample, row: int, filled: int) -> int:
        self._rows[row] = sample
        sample.row, sample.filled = row, filled
        self._slots.reserve(len(sample.context) + 1)
        return row

    def _seated(self, rows: int | None = None) -> list[tuple[int, RunningSample]]:
        """(row, sample) of the samples that run in the first `rows` rows; None: in all rows."""
        return [(row, sample) for row, sample in enumerate(self._rows[:rows]) if sample is not None]

    def _prefill(self) -> list[tuple[RunningSample, Tensor]]:
        """Prefill the next part of unfinished contexts. Returns the samples whose context is now complete, with their last hidden state."""
        pending = [(len(s.context) - s.filled, row, s) for row, s in self._seated() if s.prefilling]
        batch: list[RunningSample] = []
        spans: list[Span] = []
        for left, row, sample in sorted(pending, key=lambda p: p[:2]):
            take = left if left <= PREFILL_CHUNK + LEAST_ROWS else PREFILL_CHUNK
            if batch and (len(batch) + 1) * take > PREFILL_TOKENS:
                break
            batch.append(sample)
            spans.append(Span(row, sample.filled, sample.filled + take))
        if not batch:
            return []
        tokens = [t for s, span in zip(batch, spans) for t in s.context[span.start : span.end]]
        positions = [p for span in spans for p in range(span.start, span.end)]
        attend = prefill_attention(self._slots, spans, self.model.device)
        hidden_NH = self.model.forward(self._tensor(tokens), self._tensor(positions), attend)
        self.counters.add(prefilled_tokens=len(tokens))
        ready = []
        end = 0
        for sample, span in zip(batch, spans):
            end += span.end - span.start
            sample.filled = span.end
            if span.end == len(sample.context):
                last = hidden_NH[end - 1].clone()
                kv = self._slots.snapshot(span.row, span.end)
                self._prefixes.add(CachedPrompt(np.array(sample.context, dtype=np.int32), kv, last))
                ready.append((sample, last))
        return ready

    def _decode(self) -> list[Outcome]:
        """One token for every running sample."""
        rows = self._compact()
        running = self._seated(rows)
        tokens, positions = [0] * rows, [0] * rows
        for row, sample in running:
            tokens[row], positions[row] = sample.context[-1], len(sample.context) - 1
        self._slots.fit(max(positions) + 1)
        attend = decode_attention(self._slots, self.model.arch, self._tensor(positions))
        hidden_RH = self.model.forward(self._tensor(tokens), self._tensor(positions), attend)
        for _, sample in running:
            sample.filled += 1
        if len(running) < rows:
            hidden_RH = hidden_RH[self._tensor([row for row, _ in running])]
        return self._choose([sample for _, sample in running], hidden_RH)

    def _compact(self) -> int:
        """Move samples from the last rows into free ones, so that the decode batch gets smaller. Returns its number of rows."""
        occupied = self._seated()
        rows = min(_round_rows(len(occupied)), len(self._rows))
        free = [row for row in range(rows) if self._rows[row] is None]
        for (source, sample), target in zip([seat for seat in occupied if seat[0] >= rows], free):
            self._slots.move(source, target, sample.filled)
            self._rows[source], self._rows[target], sample.row = None, sample, target
        return rows

    def _choose(self, samples: list[RunningSample], hidden_BH: Tensor) -> list[Outcome]:
        """Sample the next token of these samples. Returns those that end with it."""
        outcomes = []
        mass = 0.0
        rows = max(1, LOGIT_ELEMENTS // self.model.arch.vocab)
        for start in range(0, len(samples), rows):
            part = samples[start : start + rows]
            noise = [uniform(self._seed, s.sample_id, s.generated) for s in part]
            drawn = draw(self.model.logits(hidden_BH[start : start + rows]), [s.job.request.sampling for s in part], noise)
            mass += float(drawn.truncated_mass.sum())
            for sample, token, logprob in zip(part, drawn.tokens.tolist(), drawn.logprobs.tolist()):
                sample.append(token, logprob, self.version)
                finish = sample.finish(self._max_context, self._decode_text)
                if finish is not None:
                    outcomes.append(self._end(sample, finish))
        self.counters.add(decoded_tokens=len(samples), truncated_mass=mass)
        return outcomes

    def _end(self, sample: RunningSample, finish: Finish) -> Outcome:
        if sample.row is not None:
            self._rows[sample.row] = None
        sample.job.unfinished -= 1
        return sample.job, sample.ended(finish)

    def _batch_logprobs(self, sequences: Sequence[np.ndarray], batch: list[int]) -> dict[int, np.ndarray]:
        lengths = [len(sequences[i]) for i in batch]
        tokens_N = self._tensor(np.concatenate([sequences[i] for i in batch]).tolist())
        positions_N = self._tensor([p for n in lengths for p in range(n)])
        hidden_NH = self.model.forward(tokens_N, positions_N, causal_attention(lengths, self.model.device))
        rows = max(1, LOGIT_ELEMENTS // self.model.arch.vocab)
        parts = []
        following_N = torch.cat([tokens_N[1:], tokens_N[:1]])  # the last of each sequence is followed by no token of its own: cut off below
        for hidden, following in zip(hidden_NH.split(rows), following_N.split(rows)):
            logprobs_NV = torch.log_softmax(self.model.logits(hidden), -1)
            parts.append(logprobs_NV.gather(1, following[:, None])[:, 0])
        logprobs = torch.cat(parts).cpu().numpy()
        ends = np.cumsum(lengths)
        return {i: logprobs[end - n : end - 1].copy() for i, n, end in zip(batch, lengths, ends)}

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.model.device)


def _round_rows(rows: int) -> int:
    """Decode batches of 4 and then multiples of 8: few shapes, at most 7 idle rows."""
    return LEAST_ROWS if rows <= LEAST_ROWS else -(-rows // 8) * 8
