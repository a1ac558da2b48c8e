"""How one global batch becomes mini-batches, data-parallel shares and micro-batches: pure logic on headers.

The driver knows every length, so it decides the whole split; ranks need no collective to agree on counts or denominators.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlinf.data.records import GroupHeader

ATTENTION_LENGTH = 16384  # context at which attention costs as much as the matrices, where the model is not known
BALANCE_TOLERANCE = 1.01
FORWARD_SHARE = 1 / 3  # of a pass forward and backward
PAIRS_PER_ROW = 1024  # attended pairs of a shared group that cost as much as the matrices for one token (SmolLM2-135M on CPU: about 940)


@dataclass(frozen=True)
class SampleRef:
    """A sample of the batch: index into RankBatch.group_ids, index in the group, its (final) scalar advantage, and whether it shares its
    group's prompt in the micro-batch or brings a copy of its own."""

    group: int
    index: int
    advantage: float
    shares: bool = True


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step as one DP rank sees it.

    micro_batches: the first `teaching` of them have a gradient, at least one, which is empty and inert where the rank has no such sample;
    those behind need a forward pass only, for the metrics. DP ranks meet only when all are done, so that their numbers may differ. The
    denominators are global: over all DP ranks and micro-batches of this mini-batch; a sample without a loss token counts in neither.
    """

    micro_batches: tuple[tuple[SampleRef, ...], ...]
    teaching: int
    global_tokens: int
    global_samples: int


@dataclass(frozen=True)
class RankBatch:
    """What one DP rank (all its TP and PP ranks) trains on in one step."""

    group_ids: tuple[str, ...]
    mini_batches: tuple[MiniBatch, ...]


class Item(NamedTuple):
    """A sample while it is being placed. prompt: key of the prompt copy it needs; equal keys in one micro-batch share one copy.
    teaches: whether it is in the gradient."""

    group: int
    sample: int
    prompt: int
    prompt_length: int
    response_length: int
    teaches: bool = True


Items = tuple[Item, ...]
Piece = tuple[float, Items]  # with its cost, negative: the costliest sorts first


def build_rank_batches(
    headers: Sequence[GroupHeader],
    advantages: Sequence[np.ndarray],
    *,
    dp: int,
    n_minibatches: int,
    max_tokens: int,
    share_prefix: bool,
    shuffle_seed: tuple[int, ...] | None = None,
    trained: Sequence[np.ndarray] | None = None,
    zero_teaches: bool = True,
    attention_length: int = ATTENTION_LENGTH,
) -> list[RankBatch]:
    """The split of one step, one RankBatch for each data-parallel rank. Deterministic; every sample is in it exactly once.

    trained: one bool for each sample of each group; the others are left out, of denominators too. None = all are in.
    zero_teaches: whether a group whose advantages are all 0 is in the gradient all the same. If not, its samples stay in the denominators
    and go to micro-batches of their own, behind those with a gradient.
    attention_length: see attention_length(); only the balance depends on it.

    Samples go to mini-batches in group order (or shuffled by shuffle_seed), then to ranks so that their costs are even, then to
    micro-batches of at most max_tokens tokens (a longer sample is alone in one). share_prefix: the samples of a group that meet in a
    micro-batch bring its prompt once, where that is cheaper; else each brings its own. With fewer samples than mini-batches some of these
    are empty, and inert.
    Raises ValueError for a repeated group id, or advantages that do not fit the headers or are not finite.
    """
    check_inputs(headers, advantages)
    shares = [share_prefix and sharing_pays(h.prompt_length, h.response_lengths) for h in headers]
    teaches = [zero_teaches or bool(np.any(group)) for group in advantages]
    items = [
        Item(g, i, g if shares[g] else len(headers) + position, h.prompt_length, h.response_lengths[i], teaches[g])
        for position, (g, h, i) in enumerate((g, h, i) for g, h in enumerate(headers) for i in range(len(h.sample_ids)))
        if trained is None or trained[g][i]
    ]
    if shuffle_seed is not None:
        items = [items[k] for k in np.random.default_rng(shuffle_seed).permutation(len(items))]
    bounds = [len(items) * k // n_minibatches for k in range(n_minibatches + 1)]
    splits = [  # [minibatch][rank][micro-batch]
        split_minibatch(sorted(items[a:b]), dp, max_tokens, attention_length) for a, b in zip(bounds, bounds[1:])
    ]
    counted = [denominators(split, headers) for split in splits]
    return [rank_batch([split[rank] for split in splits], counted, headers, advantages) for rank in range(dp)]


def attention_length(hidden: int) -> int:
    """Context at which attention takes as long as the matrices of a model of this hidden size. By operations alone it would be half as much
    again and more; attention reaches less of a device's speed."""
    return 12 * hidden


def sharing_pays(prompt: int, responses: Sequence[int]) -> bool:
    """Whether one copy of a prompt is cheaper than one for each response, by token counts.

    It saves the copies' rows. It costs attention: all responses attend at once, each padded to the longest, and over the whole rectangle
    in front of them instead of a causal half. One long response among many short ones makes it a loss.
    """
    longest = max(responses, default=0)
    together = prompt**2 / 2 + len(responses) * longest * (prompt + longest)
    apart = sum((prompt + r) ** 2 / 2 for r in responses)
    return (len(responses) - 1) * prompt > (together - apart) / PAIRS_PER_ROW


def check_inputs(headers: Sequence[GroupHeader], advantages: Sequence[np.ndarray]) -> None:
    if len({h.group_id for h in headers}) != len(headers):
        raise ValueError("a group id is repeated in the batch")
    if len(headers) != len(advantages):
        raise ValueError(f"{len(headers)} groups, advantages for {len(advantages)}")
    for header, group in zip(headers, advantages):
        if len(group) != len(header.sample_ids) or not np.isfinite(group).all():
            raise ValueError(f"group {header.group_id}: {len(header.sample_ids)} samples, advantages {np.asarray(group).tolist()}")


def denominators(split: list[list[Items]], headers: Sequence[GroupHeader]) -> tuple[int, int]:
    """Loss tokens of a mini-batch over all ranks, and samples that have any."""
    counts = [headers[item.group].loss_tokens[item.sample] for rank in split for micro in rank for item in micro]
    return sum(counts), sum(n > 0 for n in counts)


def rank_batch(
    mine: list[list[Items]], counted: Sequence[tuple[int, int]], headers: Sequence[GroupHeader], advantages: Sequence[np.ndarray]
) -> RankBatch:
    """The public form of one rank's share, with groups renumbered to those that the rank needs. counted: denominators by mini-batch."""
    groups = sorted({item.group for split in mine for micro in split for item in micro})
    number = {g: k for k, g in enumerate(groups)}
    mini_batches = []
    for split, (tokens, samples) in zip(mine, counted):
        micro_batches = tuple(
            tuple(SampleRef(number[i.group], i.sample, float(advantages[i.group][i.sample]), i.prompt == i.group) for i in micro)
            for micro in split
        )
        teaching = sum(not micro or micro[0].teaches for micro in split)
        mini_batches.append(MiniBatch(micro_batches, teaching, tokens, samples))
    return RankBatch(tuple(headers[g].group_id for g in groups), tuple(mini_batches))


def split_minibatch(items: Sequence[Item], dp: int, max_tokens: int, length: int = ATTENTION_LENGTH) -> list[list[Items]]:
    """[rank][micro-batch] -> items in (group, sample) order; at least one micro-batch on every rank, those with a gradient in front."""
    shares = balance(items, dp, length)
    return [(pack([i for i in s if i.teaches], max_tokens) or [()]) + pack([i for i in s if not i.teaches], max_tokens) for s in shares]


def split_cost(items: Sequence[Item], length: int = ATTENTION_LENGTH) -> float:
    """Cost of items that meet in a micro-batch, in units of one token's matrix work: tokens plus attended pairs / length x 2; a third of it
    where there is no backward pass."""
    tokens = micro_batch_tokens(items)
    pairs = sum(n * n / 2 for n in {i.prompt: i.prompt_length for i in items}.values())
    pairs += sum(i.prompt_length * i.response_length + i.response_length**2 / 2 for i in items)
    return (tokens + 2 * pairs / length) * (1 if items[0].teaches else FORWARD_SHARE)


def micro_batch_tokens(items: Sequence[Item]) -> int:
    """Tokens of a micro-batch: each prompt copy once, and every response."""
    if len(items) == 1:  # most are asked about one sample
        return items[0].prompt_length + items[0].response_length
    return sum({i.prompt: i.prompt_length for i in items}.values()) + sum(i.response_length for i in items)


def balance(items: Sequence[Item], dp: int, length: int = ATTENTION_LENGTH) -> list[list[Item]]:
    """Shares of even cost: longest processing time first, on whole groups; a group's samples are parted only where that evens the shares.

    Parting costs another copy of the prompt and another rank that fetches the group: it stops when the fullest share is within 1 % of the
    mean, or does not get smaller.
    """
    pieces = [(-split_cost(p, length), p) for p in together(items, lambda i: i.group)]
    even = -sum(cost for cost, _ in pieces) / dp
    load, fullest, shares = longest_first(pieces, dp)
    best_load, best = load, shares
    misses = 0  # shares may be equally full: as many partings as there are shares can be needed before the fullest one shrinks
    while load > BALANCE_TOLERANCE * even and misses <= dp:
        partable = [piece for piece in shares[fullest] if len(piece[1]) > 1]
        if not partable:
            break
        largest = min(partable)
        by_length = sorted(largest[1], key=lambda i: (-i.response_length, i))
        halves = [(-split_cost(half, length), tuple(half)) for half in (by_length[::2], by_length[1::2])]
        pieces = [p for p in pieces if p is not largest] + halves
        load, fullest, shares = longest_first(pieces, dp)
        misses += 1
        if load < best_load:
            best_load, best, misses = load, shares, 0
    return [[item for _, piece in share for item in piece] for share in best]


def by_prompt(items: Sequence[Item]) -> list[Items]:
    """Items that need the same prompt copy, together."""
    return together(items, lambda i: i.prompt)


def together(items: Sequence[Item], key: Callable[[Item], int]) -> list[Items]:
    pieces: dict[int, list[Item]] = {}
    for item in items:
        pieces.setdefault(key(item), []).append(item)
    return [tuple(piece) for piece in pieces.values()]


def longest_first(pieces: Sequence[Piece], dp: int) -> tuple[float, int, list[list[Piece]]]:
    """Longest-processing-time rule: the costliest piece next, to the share with the least cost.

    Returns (cost of the fullest share, its index, the shares).
    """
    shares: list[list[Piece]] = [[] for _ in range(dp)]
    heap = [(0.0, rank) for rank in range(dp)]
    for piece in sorted(pieces):
        load, rank = heap[0]
        shares[rank].append(piece)
        heapq.heapreplace(heap, (load - piece[0], rank))
    load, rank = max(heap, key=lambda entry: (entry[0], -entry[1]))
    return load, rank, shares


def pack(items: Sequence[Item], max_tokens: int) -> list[Items]:
    """Micro-batches of at most max_tokens: best fit decreasing, once with prompts kept whole where they fit and once sample by sample;
    of the two, the one with fewer micro-batches, then fewer tokens.
    """
    single = [(item,) for item in items]
    whole = [unit for p in by_prompt(items) for unit in ([p] if micro_batch_tokens(p) <= max_tokens else [(i,) for i in p])]
    candidates = [best_fit(units, max_tokens) for units in ((whole, single) if len(whole) < len(single) else (single,))]
    return min(candidates, key=lambda bins: (len(bins), sum(micro_batch_tokens(b) for b in bins)))


def best_fit(units: Sequence[Items], max_tokens: int) -> list[Items]:
    """Best fit decreasing, the units of one prompt in a row: into a micro-batch that has the prompt, else into the one left fullest."""
    prompt_tokens: dict[int, int] = {}
    for unit in units:
        key = unit[0].prompt
        prompt_tokens[key] = prompt_tokens.get(key, unit[0].prompt_length) + sum(i.response_length for i in unit)
    order = sorted(units, key=lambda u: (-prompt_tokens[u[0].prompt], u[0].prompt, -micro_batch_tokens(u), u))
    bins: list[list[Item]] = []
    used: list[int] = []
    prompts: list[set[int]] = []
    for unit in order:
        prompt, tokens = unit[0].prompt, micro_batch_tokens(unit)
        added = [tokens - (unit[0].prompt_length if prompt in held else 0) for held in prompts]
        fits = [k for k in range(len(bins)) if used[k] + added[k] <= max_tokens]
        if fits:
            k = min(fits, key=lambda k: (prompt not in prompts[k], -used[k] - added[k], k))
        else:
            k = len(bins)
            bins.append([])
            used.append(0)
            prompts.append(set())
            added.append(tokens)
        bins[k].extend(unit)
        used[k] += added[k]
        prompts[k].add(prompt)
    return [tuple(sorted(b)) for b in bins]
