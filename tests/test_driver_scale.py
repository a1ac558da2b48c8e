"""The benchmark of the driver: the arithmetic of its model, a small version of it, and what its kept result says."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from benchmarks import driver_scale as scale
from benchmarks import light_workers
from benchmarks.driver_scale import FITTED, ROOT, Calls, Load, fit, growth, judge
from rlinf.workers import interfaces


def load(devices: int, samples: int, cpu: float, alone: dict[str, Calls]) -> Load:
    return Load(devices, samples, [cpu + 1.0, cpu, cpu - 0.25], [10.0], [1], {}, alone)


def made(devices: int, samples: int, seconds: float = 0.0) -> dict[str, Calls]:
    """One call a group of 16 at 1 ms, one a device at 0.5 ms and 0.1 ms for each of its payloads; and so many seconds of others."""
    groups, payloads = samples // 16, samples // 8
    found = {"rollout.generate": Calls(groups, 0, 0.001 * groups)}
    found["actor.train_step"] = Calls(devices, payloads, 0.0005 * devices + 0.0001 * payloads)
    return found | {"rollout.stats": Calls(10, 0, seconds)}


def test_the_model_is_a_cost_for_each_kind_of_call() -> None:
    model = fit([load(devices, samples, 9.0, made(devices, samples)) for devices, samples in FITTED])
    assert model.per_call == pytest.approx({"rollout.generate": 0.001, "actor.train_step": 0.0005, "rollout.stats": 0})
    assert model.per_payload == pytest.approx({"rollout.generate": 0, "actor.train_step": 0.0001, "rollout.stats": 0})
    assert model.seconds(made(1024, 16384)) == pytest.approx(1.024 + 0.512 + 0.2048)
    noisy = fit([load(128, 8192, 9.0, {"x.y": Calls(128, 1000, 0.34)}), load(128, 16384, 9.0, {"x.y": Calls(128, 2000, 0.30)})])
    assert noisy.per_call["x.y"] == pytest.approx(0.0025) and noisy.per_payload["x.y"] == 0.0  # no cost below zero


def test_the_worse_of_model_and_measurement_decides() -> None:
    model = fit([load(devices, samples, 9.0, made(devices, samples)) for devices, samples in FITTED])
    near, far, over = judge(
        model, [load(*size, 2.5, made(*size, more)) for size, more in (((128, 8192), 1), ((1024, 8192), 1), ((128, 8192), 2))]
    )
    assert (near["reached"], far["reached"], over["reached"]) == (True, True, False)
    assert near["model_share"] == pytest.approx(0.006784) and near["measured_share"] == pytest.approx(0.016784) and near["aim"] == 0.02
    assert near["driver_share"] == pytest.approx(0.025) and near["calls"] == 512 + 128 + 10
    slow = fit([load(devices, samples, 9.0, made(devices, samples, 3.0)) for devices, samples in FITTED])
    assert not judge(slow, [load(128, 8192, 0.1, made(128, 8192))])[0]["reached"]


def test_growth_is_the_slope_of_the_second_half() -> None:
    assert growth([0, 10**9, 7, 7, 7, 7]) == pytest.approx(0)
    assert growth([5, 5, 5, 100, 200, 300]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("light", "real"), [("LightActor", "ActorWorker"), ("LightRollout", "RolloutWorker"), ("LightReward", "RewardWorker")]
)
def test_the_stand_ins_are_called_as_the_workers_are(light: str, real: str) -> None:
    stand_in, contract = getattr(light_workers, light), getattr(interfaces, real)
    for name, method in inspect.getmembers(stand_in, inspect.isfunction):
        if not name.startswith("_"):
            promised = [(p.name, p.kind, p.default) for p in inspect.signature(getattr(contract, name)).parameters.values()]
            assert [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()] == promised, name


@pytest.mark.slow
def test_a_small_run_stays_within_the_budget_of_calls(tmp_path: Path) -> None:
    """4 + 2 + 2 processes behind 16 devices, 32 groups a step."""
    with scale.light_cluster(tmp_path, {"actor": "0-3", "rollout": "4-5", "reward": "6-7"}) as (cluster, workers):
        found = scale.measure(cluster, workers, tmp_path, devices=16, samples=512, steps=3)
    assert len(found.cpu) == len(found.wall) == len(found.rss) == 3 and min(found.cpu) > 0
    groups = 512 // scale.GROUP_SIZE
    assert found.alone["rollout.generate"].count == found.alone["reward.judge"].count == found.alone["reward.judge"].payloads == groups
    assert found.alone["actor.train_step"].count == 16 and found.alone["actor.train_step"].payloads >= 2 * groups  # TP 2: each to two
    assert all(calls.seconds > 0 and calls.apart > 0 for calls in found.alone.values())
    assert found.calls["rollout"].pop("generate") == found.calls["reward"].pop("judge") == groups  # two calls a group
    start = {"actor": 3 * 16, "rollout": 2 * 16}  # the first weights and their probe
    for component, at_start in start.items():
        assert sum(found.calls[component].values()) * 5 <= 3 * 16 * 5 + at_start, found.calls
    assert sum(found.calls["reward"].values()) == 0


def test_the_kept_verdicts_are_those_of_the_kept_measurements() -> None:
    kept = json.loads(scale.RESULTS.read_text())
    assert {(v["devices"], v["samples"]) for v in kept["verdicts"]} == {(128, 8192), (128, 16384), (1024, 8192), (1024, 16384)}
    loads = [Load(**one | {"alone": {kind: Calls(**calls) for kind, calls in one["alone"].items()}}) for one in kept["loads"]]
    model = fit([one for one in loads if (one.devices, one.samples) in FITTED])
    for was, now in zip(kept["verdicts"], judge(model, loads), strict=True):
        assert was["reached"] == now["reached"] and was["model_seconds"] == pytest.approx(now["model_seconds"])
    page = (ROOT / "docs" / "cluster.md").read_text()  # and the page has these figures
    for v in kept["verdicts"]:
        assert f"| {v['devices']:,} | {v['samples']:,} | {v['calls']:,} | {v['measured_seconds']:.1f} | {v['model_seconds']:.1f} |" in page
    memory = kept["memory"]
    first, middle, last = (f"{memory[f'mib_{when}']:.0f}" for when in ("first", "middle", "last"))
    assert f"{memory['steps']} small steps: {first} MiB after the first, {middle} in the\nmiddle, {last} after the" in page


def test_the_kept_measurements_reach_the_aims() -> None:
    """At most 3 calls a group and 3 a rank; 2 % of a step of 100 s at 128 devices and 5 % at 1,024; memory that does not grow."""
    kept = json.loads(scale.RESULTS.read_text())
    assert kept["step_seconds"] == 100
    for v in kept["verdicts"]:
        aim = {128: 2.0, 1024: 5.0}[v["devices"]]
        assert v["measured_seconds"] <= aim and v["model_seconds"] <= aim and v["reached"], v
    for one in kept["loads"]:
        calls, groups = one["calls"], one["samples"] // kept["group_size"]
        of_groups = {"rollout": calls["rollout"]["generate"], "reward": calls["reward"]["judge"], "actor": 0}
        assert min(of_groups["rollout"], of_groups["reward"]) == groups and sum(of_groups.values()) <= 3 * groups
        ranks = {"actor": one["devices"], "rollout": one["devices"], "reward": one["devices"] // 8}
        for component, made in calls.items():  # mean of all steps, the start of the run among them
            assert sum(made.values()) - of_groups[component] <= 3 * ranks[component], (component, made)
    memory = kept["memory"]
    assert memory["steps"] == 200 and memory["bytes_a_step"] < 16384 and memory["mib_last"] < 1.02 * memory["mib_first"]
