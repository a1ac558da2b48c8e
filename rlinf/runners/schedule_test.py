"""What running ahead is worth and what it must never do, with simulated engines on a clock that jumps."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.benchmarks import ValidationConfig
from rlinf.data.sampler import PromptSampler
from rlinf.errors import UserError
from rlinf.rollout.contract import Stop
from rlinf.runners.requests import validation_requests
from rlinf.runners.schedule_wallclock import Wallclock
from rlinf.runners.step_metrics import staleness_metrics
from tests.simulated_engines import LONGEST, length_of
from tests.simulated_runs import GROUPS, PROMPTS, SAMPLES, UPDATE, Outcome, config_of, loop, make, play, samples
from tests.virtual_time import run_virtually


def check(found: Outcome, eta: int, steps: int) -> None:
    taken = [name for step in found.steps for name in step]
    assert [len(step) for step in found.steps] == [GROUPS] * steps and len(set(taken)) == len(taken)
    assert max(found.stale) <= eta


@pytest.mark.parametrize(("eta", "gain"), [(1, 1.8), (4, 2.3)])
def test_running_ahead_hides_the_long_tail(eta: int, gain: float) -> None:
    steps = 60
    waiting, ahead = play("logical", 0, steps), play("wallclock", eta, steps)
    lengths = np.array(waiting.lengths)
    assert lengths.max() >= 20 * np.median(lengths)
    check(waiting, 0, steps)
    check(ahead, eta, steps)
    assert waiting.seconds / ahead.seconds >= gain


@pytest.mark.parametrize(("eta", "rollout"), [(1, {}), (4, {}), (2, {"partial": True, "over_provisioning": 1.5})])
def test_the_length_bias_sees_the_long_answers_that_are_still_out(eta: int, rollout: dict[str, Any]) -> None:
    """Compared with the bias that only who knows all lengths can state: the first step's is negative, and far from 0; it is underestimated,
    never by more than half; and in all steps together the two go hand in hand."""
    pairs, config = [], config_of("wallclock", eta, **rollout)
    for seed in range(4):
        begun: dict[str, None] = {}  # in order
        found = run_virtually(loop(config, 15, seed, 0.5, lambda schedule, _: begun.update(dict.fromkeys(schedule.bias.begun))))
        taken: list[str] = []
        for step, metrics in zip(found.steps, found.metrics):
            taken += step
            window = slice(max(0, len(taken) - (eta + 1) * GROUPS), len(taken))
            trained, in_turn = (
                sum(length_of(seed, f"{g}/{k}") for g in names[window] for k in range(SAMPLES)) for names in (taken, [*begun])
            )
            pairs.append((metrics["rollout/length_bias"], trained / in_turn - 1))
        estimate, truth = pairs[-15]
        assert truth < -0.25 and 1.05 * truth < estimate < 0.4 * truth
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{}, {"partial": True}, {"over_provisioning": 1.5}, {"partial": True, "over_provisioning": 1.5}])
def test_five_hundred_steps_starve_nobody(rollout: dict[str, Any]) -> None:
    """Every group is trained on within eta + 1 steps of being begun, the longest ones too; all but the last few that were begun."""
    steps, eta = 500, 2
    found = play("wallclock", eta, steps, seed=1, **rollout)
    check(found, eta, steps)
    begun = Counter(int(name.split(".")[0]) for step in found.steps for name in step)
    assert all(begun[step] == GROUPS for step in range(1, steps - eta))
    lengths = np.array(found.lengths)
    assert (lengths == LONGEST).sum() > 20


@pytest.mark.parametrize("seed", range(4))
def test_logical_batches_do_not_depend_on_how_long_anything_takes(seed: int) -> None:
    """The groups of a step are those of the synchronous loop, each decoded under one version: max(0, step - 1 - eta)."""
    steps = 12
    base = play("logical", 0, steps, seed)
    for eta in (1, 3):
        found = play("logical", eta, steps, seed)
        assert found.steps == base.steps and found.stale == [min(step, eta) for step in range(steps)]
        assert found.seconds < base.seconds


def test_engines_stand_still_while_the_actor_trains_and_nothing_is_lost() -> None:
    steps = 40
    found = play("wallclock", 1, steps, partial=True)
    check(found, 1, steps)
    assert max(m["rollout/carried_over"] for m in found.metrics) > 0
    assert sum(found.lengths) == found.engines.tokens  # not one token was decoded twice
    assert found.engines.aborts < 2 * steps * 500  # of two engines, which need up to 40 seconds to hear it, each step
    assert found.seconds < play("logical", 0, steps).seconds


def test_validation_leaves_carried_over_groups_of_the_same_prompts_alone() -> None:
    """Training data and validation data may name their prompts alike."""

    async def run() -> None:
        schedule, engines, rollouts, _ = make(config_of("wallclock", 1, partial=True), 40, 0)
        await schedule.take(1)
        await schedule.before_training()
        kept = dict(rollouts.unfinished)
        prompts = [SimpleNamespace(prompt_id=name.partition(".")[2], token_ids=np.ones(3, np.int32)) for name in kept]
        scored = await rollouts.generate_groups(
            validation_requests(ValidationConfig(), AlgorithmConfig(), Stop(), 1, prompts, "validation")
        )
        assert kept and [len(header.sample_ids) for header, _ in scored] == [1] * len(kept)
        assert all(header.versions == (((0, header.response_lengths[0]),),) for header, _ in scored)
        assert rollouts.unfinished == kept
        engines.version = 1
        assert len((await schedule.take(2)).scored) == GROUPS

    run_virtually(run())


def test_a_group_that_is_done_while_a_checkpoint_is_written_is_kept_as_it_was() -> None:
    """Without rollout.partial groups go on meanwhile, those of an engine that died with what it had handed over."""

    async def run() -> None:
        schedule, _, rollouts, judges = make(config_of("wallclock", 1), 40, 0)
        await schedule.take(1)
        handed_over = {name: SimpleNamespace(versions=[]) for name in list(schedule.tasks)[:3]}
        rollouts.unfinished |= handed_over
        write = judges.call

        async def write_when_they_are_done(rank: int, method: str, *args: Any) -> Any:
            if method == "keep":
                rollouts.unfinished.clear()
            return await write(rank, method, *args)

        judges.call = write_when_they_are_done
        state = await schedule.save(Path("waiting"))
        assert [judges.files[f"waiting/{state['files'][name]}.safetensors"] for name in handed_over] == [
            (tokens, ()) for tokens in handed_over.values()
        ]

    run_virtually(run())


async def go_on(
    first: tuple[str, int, int], second: tuple[str, int, int], at: int, steps: int, record: list[tuple[str, str]] | None = None
) -> list[list[str]]:
    """The steps of (schedule, eta, groups of a step) until step `at`, and those of another such life behind its checkpoint.

    record: what the second life writes down."""
    taken: list[list[str]] = []
    kept, state, files = {}, {}, {}
    for (kind, eta, groups), begin, end in ((first, 0, at), (second, at, steps)):
        schedule, engines, _, judges = make(config_of(kind, eta), steps, 0, groups=groups)
        judges.files, engines.version = files, begin
        if begin:
            judges.written = judges.written if record is None else record
            schedule.sampler.load_state_dict(state)
            await schedule.restore(Path("kept"), kept, begin)
        for step in range(begin + 1, end + 1):
            batch = await schedule.take(step)
            await schedule.before_training()
            headers = [h for h, _ in batch.scored]
            assert len(headers) == groups and staleness_metrics(headers, step - 1)["rollout/staleness_max"] <= eta
            taken.append([h.group_id for h in headers])
            await schedule.before_sync()
            engines.version = step
        kept, state, files = json.loads(json.dumps(await schedule.save(Path("kept")))), schedule.sampler.state_dict(), judges.files
    return taken


def test_the_length_bias_goes_on_behind_a_checkpoint() -> None:
    async def run() -> None:
        first, _, _, judges = make(config_of("wallclock", 2), 40, 0)
        for step in (1, 2):
            await first.take(step)
        kept = json.loads(json.dumps(await first.save(Path("kept"))))
        for state in (kept, {name: value for name, value in kept.items() if name != "bias"}):  # the second as an older version wrote it
            again, _, _, reader = make(config_of("wallclock", 2), 40, 0)
            reader.files = judges.files
            await again.restore(Path("kept"), state, 2)
            held = again.bias.state(again.rollouts.engine_clock)
            assert held["trained"] == (kept["bias"]["trained"] if "bias" in state else [])
            names, known = [name for name, *_ in held["begun"]], [name for name, *_, length in held["begun"] if length is not None]
            assert names == [name for name, *_ in kept["bias"]["begun"] if name in names] and set(again.wanted) <= set(names)
            assert set(known) == set(names) - set(again.wanted) | set(again.done) and again.done

    run_virtually(run())


@pytest.mark.parametrize(("first", "second"), [
    (("logical", 0, 16), ("logical", 0, 32)), (("logical", 0, 16), ("wallclock", 2, 8)), (("wallclock", 0, 16), ("logical", 1, 24)),
    (("wallclock", 0, 16), ("wallclock", 2, 24)), (("logical", 1, 16), ("logical", 3, 16)), (("wallclock", 1, 16), ("wallclock", 3, 16)),
])  # fmt: skip
def test_what_may_change_behind_a_checkpoint_loses_and_doubles_nothing(first: tuple[str, int, int], second: tuple[str, int, int]) -> None:
    at, steps = 6, 12
    names = [name for step in run_virtually(go_on(first, second, at, steps)) for name in step]
    prompts = [name.split(".")[1] for name in names]
    used = PromptSampler(PROMPTS, 1, True, 0).next_batch(at * first[2] + (steps - at) * second[2])
    assert sorted(prompts) == sorted(f"p{i}" for i in used)
    assert max(int(name.split(".")[0]) for name in names) == steps  # named by the step that a group was begun for


@pytest.mark.parametrize(("schedule", "eta"), [("logical", 0), ("logical", 2), ("wallclock", 2)])
def test_what_a_checkpoint_brought_along_is_written_down_like_what_is_judged(schedule: str, eta: int) -> None:
    """Each group that the second life trains on, once, with those of the step that it was begun for."""
    record: list[tuple[str, str]] = []
    life = (schedule, eta, GROUPS)
    trained = [name for step in run_virtually(go_on(life, life, 5, 9, record))[5:] for name in step]
    assert len(set(record)) == len(record) and {name for _, name in record} >= {*trained}
    assert all(file == samples(int(name.partition(".")[0])) for file, name in record)


def test_groups_without_signal_come_with_a_checkpoint_too() -> None:
    """A branch of the run has all that was generated for its steps in its samples and journal, as its order files say."""

    async def run() -> None:
        config = config_of("logical", 1, dynamic_sampling=True)
        first, _, _, judges = make(config, 9, 0, right=0.2)
        await first.take(1)
        await first.before_sync()
        kept = json.loads(json.dumps(await first.save(Path("kept"))))
        (waiting,) = [batch.result() for batch in first.batches]
        again, _, _, reader = make(config, 9, 0, right=0.2)
        reader.files = judges.files
        again.sampler.load_state_dict(first.sampler.state_dict())
        await again.restore(Path("kept"), kept, 1)
        batch = await again.batches[0]
        assert sorted(reader.written) == sorted((samples(2), h.group_id) for h in waiting.generated)
        assert batch.generated == waiting.generated and len(batch.generated) > GROUPS == len(batch.scored)
        assert [h for h, _ in batch.scored] == [h for h, _ in waiting.scored]
        assert [h for h, _ in batch.spare] == [h for h in waiting.generated if h not in [of for of, _ in waiting.scored]]
        older = kept | {"waiting": [{**kept["waiting"][0], "generated": [
            name if name in kept["waiting"][0]["scored"] else asdict(header)
            for name, header in zip(kept["waiting"][0]["generated"], waiting.generated)
        ]}]}  # fmt: skip
        again.batches.clear()
        await again.restore(Path("kept"), json.loads(json.dumps(older)), 1)
        batch = await again.batches[0]
        assert [h.group_id for h in batch.generated] == [h.group_id for h in waiting.generated] and batch.spare == []

    run_virtually(run())


def test_over_provisioning_bounds_what_is_on_its_way() -> None:
    config, most = config_of("wallclock", 4, over_provisioning=1.5), []
    run_virtually(loop(config, 30, 0, 0.5, lambda schedule, _: most.append(len(schedule.ledger.groups))))
    assert max(most) <= int(1.5 * GROUPS)
    free = config_of("wallclock", 4)
    run_virtually(loop(free, 30, 0, 0.5, lambda schedule, _: most.append(len(schedule.ledger.groups))))
    assert max(most) > 1.5 * GROUPS


def test_groups_that_teach_nothing_make_room_and_too_many_are_an_error() -> None:
    found = play("wallclock", 1, 30, right=0.2, dynamic_sampling=True)
    check(found, 1, 30)
    filtered = sum(m["rollout/prompts_filtered"] for m in found.metrics)
    assert 0.25 < filtered / (filtered + 30 * GROUPS) < 0.6  # (1 - 0.2)^4 = 0.41 are all wrong
    with pytest.raises(UserError, match="dynamic_sampling"):
        play("wallclock", 1, 30, right=0.0, dynamic_sampling=True, dynamic_sampling_max_batches=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("schedule", "eta", "over_provisioning"), [
    ("logical", 0, 0), ("logical", 1, 0), ("wallclock", 0, 0), ("wallclock", 1, 0), ("wallclock", 2, 0), ("wallclock", 2, 1.0),
])  # fmt: skip
def test_dynamic_sampling_ends_with_the_data(schedule: str, eta: int, over_provisioning: float, seed: int) -> None:
    """A step is begun while the epochs hold a batch for it; only the last one may need prompts of a further epoch to be complete."""
    prompts, most = 160, 160 // GROUPS
    config = config_of(schedule, eta, dynamic_sampling=True, max_epochs=1, over_provisioning=over_provisioning)
    taken: list[str] = []
    handed_out: list[int] = []

    async def run() -> int:
        plan, engines, _, _ = make(config, most, seed, 0.2, prompts)
        while len(handed_out) < most and not plan.exhausted:
            handed_out.append(plan.sampler.handed_out)
            step = len(handed_out)
            batch = await plan.take(step)
            taken.extend(h.group_id for h, _ in batch.scored)
            await plan.before_training()
            await asyncio.sleep(UPDATE)
            await plan.before_sync()
            engines.version, last = step, plan.exhausted
            await plan.save(Path("waiting"))
            assert plan.exhausted == last  # the loop asks before and after a checkpoint
        over = len(plan.ledger.groups) if isinstance(plan, Wallclock) else 0
        assert prompts - plan.sampler.handed_out + over < GROUPS
        return plan.sampler.handed_out

    assert run_virtually(run()) < prompts + 3 * GROUPS and max(handed_out) <= prompts
    assert len(set(taken)) == len(taken) == GROUPS * len(handed_out) and 4 <= len(handed_out) <= 6  # (1 - 0.2)^4 = 0.41 are all wrong
