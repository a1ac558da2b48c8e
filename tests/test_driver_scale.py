"""The benchmark of the driver: the arithmetic of its model, a small version of it, and what its kept result says."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from benchmarks import driver_scale as scale
from benchmarks import light_workers
from benchmarks.driver_scale import FITTED, ROOT, Load, Model, fit, growth, judge
from rlinf.workers import interfaces


def load(devices: int, samples: int, cpu: float) -> Load:
    return Load(devices, samples, [cpu + 1.0, cpu, cpu - 0.25], [10.0], [1], {})


def test_the_model_is_the_plane_through_the_medians() -> None:
    """0.1 s, 1 ms a group of 16, 2 ms a device."""
    true = Model(0.1, 0.001, 0.002)
    found = fit([load(devices, samples, 0.1 + 0.001 * samples / 16 + 0.002 * devices) for devices, samples in FITTED])
    assert (found.fixed, found.per_group, found.per_device) == pytest.approx((0.1, 0.001, 0.002))
    assert found.seconds(1024, 16384) == pytest.approx(0.1 + 1.024 + 2.048)
    assert true.seconds(128, 8192) == pytest.approx(0.1 + 0.512 + 0.256)


def test_the_worse_of_model_and_measurement_decides() -> None:
    model = Model(0.0, 0.001, 0.002)  # 128 devices, 8,192 samples: 0.768 s; 1,024 devices: 2.56 s
    near, far, over = judge(model, [load(16, 8192, 9.0), load(128, 8192, 1.9), load(1024, 8192, 4.9), load(128, 8192, 2.1)])
    assert (near["reached"], far["reached"], over["reached"]) == (True, True, False)
    assert near["model_share"] == pytest.approx(0.00768) and near["measured_share"] == pytest.approx(0.019) and near["aim"] == 0.02
    (slow,) = judge(Model(3.0, 0.0, 0.0), [load(128, 8192, 0.1)])
    assert not slow["reached"]


def test_growth_is_the_slope_of_the_second_half() -> None:
    assert growth([0, 10**9, 7, 7, 7, 7]) == pytest.approx(0)
    assert growth([5, 5, 5, 100, 200, 300]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("light", "real"), [("LightActor", "TrainWorker"), ("LightRollout", "RolloutWorker"), ("LightReward", "RewardWorker")]
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
    assert found.calls["rollout"].pop("generate") == found.calls["reward"].pop("judge") == groups  # two calls a group
    start = {"actor": 3 * 16, "rollout": 2 * 16}  # the first weights and their probe
    for component, at_start in start.items():
        assert sum(found.calls[component].values()) * 4 <= 3 * 16 * 4 + at_start, found.calls
    assert sum(found.calls["reward"].values()) == 0


def test_the_kept_verdicts_are_those_of_the_kept_measurements() -> None:
    kept = json.loads(scale.RESULTS.read_text())
    assert {(v["devices"], v["samples"]) for v in kept["verdicts"]} == {(128, 8192), (128, 16384), (1024, 8192), (1024, 16384)}
    loads = [Load(**{name: one[name] for name in ("devices", "samples", "cpu", "wall", "rss", "calls")}) for one in kept["loads"]]
    model = fit([one for one in loads if (one.devices, one.samples) in FITTED])
    for was, now in zip(kept["verdicts"], judge(model, loads), strict=True):
        assert was["reached"] == now["reached"] and was["model_seconds"] == pytest.approx(now["model_seconds"])
    for one in loads:  # calls of a step: at most 3 a group and 3 a rank of a component, beside those of the start
        of_groups = one.calls["rollout"]["generate"] + one.calls["reward"]["judge"]
        assert of_groups == 2 * one.groups
    page = (ROOT / "docs" / "cluster.md").read_text()
    for v in kept["verdicts"]:  # and the page has these figures
        assert f"| {v['devices']:,} | {v['samples']:,} | {v['model_seconds']:.1f} | {v['measured_seconds']:.1f} |" in page
