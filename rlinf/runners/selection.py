"""What a step learns from: which prompts, which of their groups, which responses, with which advantages.

All of it is computed from group headers and seeds alone, so that a resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlinf.algorithms.advantages import outcome_advantages
from rlinf.algorithms.filters import has_signal, update_subset
from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.own_code import own_function
from rlinf.data.records import GroupHeader
from rlinf.data.sampler import PromptSampler
from rlinf.errors import UserError
from rlinf.runners.rollouts import Scored
from rlinf.runners.step_metrics import dynamic_sampling_metrics


@dataclass(frozen=True)
class StepBatch:
    """The batch of a step. scored: the groups to train on. generated: headers of all groups that were generated to find them.
    metrics: of the choice. spare: of those generated, the ones that are not trained on, where a checkpoint may have to hold them."""

    scored: list[Scored]
    generated: list[GroupHeader]
    metrics: dict[str, float]
    spare: list[Scored] = field(default_factory=list)


async def next_groups(
    sampler: PromptSampler, algorithm: AlgorithmConfig, generate: Callable[[list[int]], Awaitable[list[Scored]]]
) -> StepBatch:
    """The groups of one step; with dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) only those with right and wrong answers.

    Groups are chosen in the order of their prompts, not in the order in which they finish: otherwise short answers would be favoured, and a
    resumed run would choose others. Prompts after the last group that was needed go back to the sampler: every prompt of an epoch is either
    trained on or filtered out, exactly once. Raises UserError when algorithm.dynamic_sampling_max_batches batches do not give enough.
    """
    if not algorithm.dynamic_sampling:
        scored = await generate(sampler.next_batch())
        return StepBatch(scored, [header for header, _ in scored], {})
    kept: list[Scored] = []
    spare: list[Scored] = []
    generated: list[GroupHeader] = []
    size, used = algorithm.dynamic_sampling_batch_size or sampler.batch_size, 0
    for _ in range(algorithm.dynamic_sampling_max_batches):
        for one in await generate(sampler.next_batch(size)):
            generated.append(one[0])
            wanted = len(kept) < sampler.batch_size
            used += wanted
            (kept if wanted and has_signal(one[0].right) else spare).append(one)
        if len(kept) == sampler.batch_size:
            sampler.give_back(len(generated) - used)
            return StepBatch(kept, generated, dynamic_sampling_metrics(len(generated), used, used - len(kept)), spare)
    raise no_signal(algorithm, size, sampler.batch_size, len(kept), generated)


def no_signal(algorithm: AlgorithmConfig, size: int, wanted: int, kept: int, generated: Sequence[GroupHeader]) -> UserError:
    """The error for a step in which too many of the generated groups are all right or all wrong."""
    return UserError(
        f"algorithm.dynamic_sampling: {algorithm.dynamic_sampling_max_batches} batches of {size} prompts gave only {kept} of "
        f"{wanted} groups with both right and wrong answers ({sum(all(h.right) for h in generated)} were all right, "
        f"{sum(not any(h.right) for h in generated)} all wrong): change the data or algorithm.group_size, raise "
        "algorithm.dynamic_sampling_max_batches, or set algorithm.dynamic_sampling to false; the run goes on with runner.resume_dir=auto"
    )


def counted_tokens(header: GroupHeader, algorithm: AlgorithmConfig) -> list[int]:
    """How many tokens of each response enter the loss; with overlong filtering (DAPO, section 3.4) none of a response that was cut off."""
    cut = [algorithm.overlong_filtering and finish.cut_off for finish in header.finishes]
    return [0 if out else n for out, n in zip(cut, header.loss_tokens)]


def trained_samples(headers: Sequence[GroupHeader], algorithm: AlgorithmConfig, seed: int) -> list[np.ndarray]:
    """Which responses of each group are trained on (bool): of those that num_update_sample_per_prompt chooses (RaML, arXiv 2505.19815),
    the ones with tokens in the loss."""
    chosen = []
    for header in headers:
        size = len(header.sample_ids)
        subset = update_subset(seed, header.group_id, size, algorithm.num_update_sample_per_prompt or size)
        chosen.append(subset & (np.array(counted_tokens(header, algorithm)) > 0))
    return chosen


def group_advantages(headers: Sequence[GroupHeader], algorithm: AlgorithmConfig) -> list[np.ndarray]:
    """Advantages of each group, from the rewards of all its responses. Whitened here, unless the actor does that later token by token."""
    tokens = [counted_tokens(header, algorithm) for header in headers]
    whiten = algorithm.normalize_advantages and not algorithm.token_level
    own = own_function(algorithm.adv_type)
    return outcome_advantages([h.rewards for h in headers], tokens, algorithm.adv_type, whiten, own)
