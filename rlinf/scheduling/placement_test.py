"""Every rank has one seat; illegal placements are refused with the key and the remedy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from rlinf.config.schema import ActorModelConfig, ClusterConfig, Config
from rlinf.errors import UserError
from rlinf.scheduling.placement import PART, Node, Plan, build_evaluation_plan, build_plan, build_sft_plan, describe, nodes_of, publishers


def config_of(
    nodes: int, per_node: int, placement: dict[str, str], tp: int = 1, pp: int = 1, rollout_tp: int = 1, backend: str = "ray", cp: int = 1
) -> Config:
    config = Config(cluster=ClusterConfig(backend=backend, num_nodes=nodes, num_gpus_per_node=per_node, component_placement=placement))
    config.actor.model.tensor_model_parallel_size, config.actor.model.pipeline_model_parallel_size = tp, pp
    config.actor.model.context_parallel_size, config.rollout.tensor_parallel_size = cp, rollout_tp
    if rollout_tp > per_node:  # what engines that span nodes ask for
        config.rollout.weight_transport, config.rollout.max_engine_restarts = "disk", 0
    return config


def plan_of(*args, **kwargs) -> Plan:
    config = config_of(*args, **kwargs)
    return build_plan(config, nodes_of(config.cluster))


ALL = {"actor,rollout,reward": "all"}


def test_weights_by_device_need_a_device_in_common() -> None:
    def plan_by_device(placement: dict[str, str], **sizes: int) -> Plan:
        config = config_of(1, 4, placement, **sizes)
        config.rollout.weight_transport = "device_ipc"
        return build_plan(config, nodes_of(config.cluster))

    for sizes in ({}, {"tp": 2, "rollout_tp": 2}, {"pp": 2, "rollout_tp": 4}):
        assert plan_by_device(ALL, **sizes).mode == "collocated"
    apart, elsewhere = {"actor": "0-1", "rollout,reward": "2-3"}, {"tp": 2, "rollout_tp": 1}
    for placement, sizes in ((apart, {}), (ALL, elsewhere), (ALL, {"pp": 2, "rollout_tp": 2})):
        with pytest.raises(UserError, match="rollout.weight_transport: device_ipc .* change cluster.component_placement"):
            plan_by_device(placement, **sizes)


def check(plan: Plan, actor_devices: set, rollout_devices: set, tp: int, pp: int, rollout_tp: int) -> None:
    """What every legal plan must satisfy."""
    actors, engines, parts, rewards = plan.of("actor"), plan.of("rollout"), plan.of(PART), plan.of("reward")
    assert len(actors) + len(engines) + len(parts) + len(rewards) == len(plan.seats)
    for seats in (actors, engines, parts, rewards):
        assert [s.rank for s in seats] == list(range(len(seats)))
        taken = Counter((s.node, d) for s in seats for d in s.devices)
        assert not taken or max(taken.values()) == 1
    assert {(s.node, s.devices[0]) for s in actors} == actor_devices and all(len(s.devices) == 1 for s in actors)
    assert {(s.node, d) for s in engines + parts for d in s.devices} == rollout_devices and len(engines) * rollout_tp == len(
        rollout_devices
    )
    for i, engine in enumerate(engines):
        others = len(parts) // len(engines)
        whole = [engine, *parts[i * others : (i + 1) * others]]
        assert sum(len(s.devices) for s in whole) == rollout_tp and len({len(s.devices) for s in whole}) == 1
        assert others == 0 or [s.node for s in whole] == list(range(engine.node, engine.node + len(whole)))
    assert len({s.node for s in rewards}) == len(rewards)
    assert len(actors) % (tp * pp) == 0
    dp = len(actors) // (tp * pp)
    whole = sum(n // tp for n in Counter(node for node, _ in actor_devices).values())  # TP groups that can lie inside one node
    inside = 0
    for stage, replica in itertools.product(range(pp), range(dp)):
        first = tp * (replica + dp * stage)
        inside += len({actors[first + t].node for t in range(tp)}) == 1
    assert inside == whole


def reason(actor: set, rollout: set, tp: int, pp: int, rollout_tp: int) -> str | None:
    """Why such a placement is refused, by the rules of docs/cluster.md and not by the code; None when it is legal."""
    if len(actor) < tp * pp:
        return f"the actor needs at least {tp * pp} devices .* but it has {len(actor)}; give it more"
    if len(actor) % (tp * pp):
        fewer = len(actor) // (tp * pp) * (tp * pp)
        return f"the actor has {len(actor)} devices, .* give it {fewer} or {fewer + tp * pp} devices"
    if len(rollout) % rollout_tp:
        return f"rollout.tensor_parallel_size: engines of {rollout_tp} devices do not fit the rollout's {len(rollout)} devices"
    per_node = set(Counter(node for node, _ in rollout).values())
    inside, spanning = all(n % rollout_tp == 0 for n in per_node), len(per_node) == 1 and rollout_tp % max(per_node) == 0
    return None if inside or spanning else f"rollout.tensor_parallel_size: an engine of {rollout_tp} devices stays inside one node"


def proved(nodes: int, placement: dict[str, str], actor: set, rollout: set, tp: int, pp: int, rollout_tp: int) -> str:
    """Build the plan and prove it right, or refused for the right reason: its mode, or ""."""
    config = config_of(nodes, 8, placement, tp, pp, rollout_tp)
    config.rollout.weight_transport, config.rollout.max_engine_restarts = "disk", 0  # as engines that span nodes ask for
    refused = reason(actor, rollout, tp, pp, rollout_tp)
    if refused:
        with pytest.raises(UserError, match=refused):
            build_plan(config, nodes_of(config.cluster))
        return ""
    plan = build_plan(config, nodes_of(config.cluster))
    check(plan, actor, rollout, tp, pp, rollout_tp)
    assert plan.mode == ("collocated" if actor == rollout else "hybrid" if actor & rollout else "disaggregated")
    assert plan.shares_device("actor", "rollout") == bool(actor & rollout)
    return plan.mode


@pytest.mark.parametrize("nodes", range(1, 17))
def test_every_layout_of_whole_nodes_seats_every_rank_once(nodes: int) -> None:
    everything, modes = {(n, d) for n in range(nodes) for d in range(8)}, Counter()
    for tp, pp, rollout_tp in itertools.product((1, 2, 3, 4, 5, 8, 16), (1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 8, 16)):
        modes[proved(nodes, ALL, everything, everything, tp, pp, rollout_tp)] += 1
    assert modes.keys() == {"", "collocated"}


@pytest.mark.parametrize("nodes", range(2, 17))
def test_every_split_between_nodes_seats_every_rank_once(nodes: int) -> None:
    """Engines have the first nodes and the actor the others: at every node, and with one node in common."""
    modes = Counter()
    for end, common, (tp, pp), rollout_tp in itertools.product(
        range(1, nodes), (0, 1), ((1, 1), (2, 1), (8, 1), (3, 1), (4, 2), (16, 1), (2, 5)), (1, 2, 3, 8, 16)
    ):
        placement = {"rollout,reward": f"0-{8 * end - 1}", "actor": f"{8 * (end - common)}-{8 * nodes - 1}"}
        actor = {(n, d) for n in range(end - common, nodes) for d in range(8)}
        modes[proved(nodes, placement, actor, {(n, d) for n in range(end) for d in range(8)}, tp, pp, rollout_tp)] += 1
    assert modes.keys() == {"", "disaggregated", "hybrid"}


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_every_split_into_two_ranges_seats_every_rank_once(nodes: int) -> None:
    world, modes = nodes * 8, Counter()
    for end, start, tp, pp, rollout_tp in itertools.product(range(1, world, 2), range(0, world, 3), (1, 2, 4), (1, 2), (1, 2, 4)):
        placement = {"rollout": f"0-{end - 1}", "actor": f"{start}-{world - 1}", "reward": "0"}
        actor, rollout = {divmod(d, 8) for d in range(start, world)}, {divmod(d, 8) for d in range(end)}
        modes[proved(nodes, placement, actor, rollout, tp, pp, rollout_tp)] += 1
    assert modes["hybrid"] and modes["disaggregated"]


def test_actor_ranks_run_through_tensor_then_data_then_pipeline() -> None:
    plan = plan_of(2, 4, ALL, tp=2, pp=2)
    stage_1 = plan.of("actor")[4:]
    assert [(s.node, s.devices) for s in plan.of("actor")[:4]] == [(0, (i,)) for i in range(4)]
    assert {s.node for s in stage_1} == {1}


def test_context_parallel_ranks_stand_between_tensor_and_data_parallel_ones() -> None:
    for nodes, tp, pp, cp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4)):
        if nodes * 8 % (tp * pp * cp):
            with pytest.raises(UserError, match=f"context_parallel_size {cp} = {tp * pp * cp}|needs at least {tp * pp * cp} devices"):
                plan_of(nodes, 8, ALL, tp, pp, cp=cp)
            continue
        plan = plan_of(nodes, 8, ALL, tp, pp, cp=cp)
        check(plan, *[{(n, d) for n in range(nodes) for d in range(8)}] * 2, tp, pp, 1)
        together = [{s.node for s in plan.of("actor")[i : i + tp * cp]} for i in range(0, nodes * 8, tp * cp)]  # of one model copy's stage
        assert max(map(len, together)) == max(1, tp * cp // 8)
    config = config_of(1, 8, ALL, tp=2, cp=2)
    assert "actor    8 rank(s) = TP 2 x CP 2 x DP 2 x PP 1" in describe(build_plan(config, nodes_of(config.cluster)), config)


@pytest.mark.parametrize(("tp", "cp", "pp", "dp"), [(1, 1, 1, 1), (2, 1, 1, 3), (2, 2, 3, 4)])
def test_every_copy_of_the_model_has_a_first_rank_of_each_stage_that_speaks_for_it(tp: int, cp: int, pp: int, dp: int) -> None:
    model = ActorModelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp)
    ranks = tp * cp * pp * dp
    assert model.data_parallel_size(ranks) == dp
    copies = [[rank for rank in range(ranks) if model.data_parallel_rank(rank, ranks) == d] for d in range(dp)]
    assert publishers(model, ranks) == [copy[:: tp * cp] for copy in copies]
    assert all(len(copy) == tp * cp * pp for copy in copies)


def test_tensor_parallel_groups_prefer_one_node() -> None:
    plan = plan_of(2, 8, {"actor": "6-13", "rollout,reward": "0-5"}, tp=4)
    assert [(s.node, s.devices[0]) for s in plan.of("actor")] == [(0, 6), (0, 7), (1, 4), (1, 5), (1, 0), (1, 1), (1, 2), (1, 3)]


def test_reward_has_one_process_a_node_on_its_first_device() -> None:
    plan = plan_of(3, 4, {"actor,rollout": "all", "reward": "2-3,5-6,9"})
    assert [(s.node, s.devices) for s in plan.of("reward")] == [(0, (2,)), (1, (1,)), (2, (1,))]


def test_engines_take_consecutive_devices() -> None:
    plan = plan_of(1, 8, {"actor,reward": "0-3", "rollout": "4-7"}, rollout_tp=2)
    assert [s.devices for s in plan.of("rollout")] == [(4, 5), (6, 7)]
    assert plan.mode == "disaggregated"


def test_an_engine_that_spans_nodes_has_as_many_devices_on_each() -> None:
    def plan(transport: str = "broadcast", restarts: int = 0, backend: str = "sglang") -> Plan:
        config = config_of(4, 2, {"actor": "0,2,4,6", "rollout,reward": "1,3,5,7"}, rollout_tp=2)
        config.rollout.weight_transport, config.rollout.max_engine_restarts, config.rollout.rollout_backend = transport, restarts, backend
        return build_plan(config, nodes_of(config.cluster))

    assert [(s.component, s.rank, s.node, s.devices) for s in plan().seats if s.component.startswith("rollout")] == [
        ("rollout", 0, 0, (1,)), ("rollout", 1, 2, (1,)), ("rollout_part", 0, 1, (1,)), ("rollout_part", 1, 3, (1,)),
    ]  # fmt: skip
    for refused, word in (({"transport": "auto"}, "disk or broadcast"), ({"restarts": 1}, "to 0"), ({"backend": "embedded"}, "sglang")):
        with pytest.raises(UserError, match=f"rollout.tensor_parallel_size: engines of 2 devices span nodes.*{word}"):
            plan(**refused)


def test_an_evaluation_restarts_no_engine_that_spans_nodes() -> None:
    config = config_of(2, 2, ALL, rollout_tp=4)
    config.rollout.rollout_backend, config.rollout.weight_transport = "sglang", "auto"  # no weights are sent
    assert len(build_evaluation_plan(config, nodes_of(config.cluster)).of(PART)) == 1
    config.rollout.max_engine_restarts = 1
    with pytest.raises(UserError, match="engines of 4 devices span nodes, .*: set rollout.max_engine_restarts to 0"):
        build_evaluation_plan(config, nodes_of(config.cluster))
    config.rollout.tensor_parallel_size = 2
    assert len(build_evaluation_plan(config, nodes_of(config.cluster)).of("rollout")) == 2


def test_a_profiled_rank_is_one_of_some_role() -> None:
    def plan(ranks: list[int], build: Callable[[Config, list[Node]], Plan] = build_plan) -> Plan:
        config = config_of(1, 6, {"actor": "0-3", "rollout,reward": "4-5"})
        config.runner.profile_steps, config.runner.profile_ranks = [2], ranks
        return build(config, nodes_of(config.cluster))

    assert plan([0, 3]) and plan([3], build_sft_plan)
    for rank in (4, -1):
        with pytest.raises(UserError, match=f"runner.profile_ranks: no role has rank {rank}; there are actor 0-3, rollout 0-1; name some"):
            plan([0, rank])
    with pytest.raises(UserError, match="no role has rank 4; there are actor 0-3; name some"):
        plan([4], build_sft_plan)


def test_nodes_may_differ_in_size() -> None:
    config = config_of(2, 4, ALL)
    plan = build_plan(config, [Node(0, 4), Node(1, 2)])
    assert [(s.node, s.devices[0]) for s in plan.of("actor")] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (
            (1, 2, ALL),
            dict(tp=2, pp=2),
            ["actor needs at least 4 devices", "has 2", "actor.model.tensor_model_parallel_size 2", "num_gpus_per_node"],
        ),
        ((1, 6, ALL), dict(tp=4), ["actor has 6 devices", "give it 4 or 8 devices"]),
        ((1, 6, ALL), dict(rollout_tp=4), ["rollout.tensor_parallel_size", "6 devices", "[1, 2, 3, 6]"]),
        ((2, 3, ALL), dict(rollout_tp=2), ["rollout.tensor_parallel_size", "inside one node", "3 on node 0, 3 on node 1", "multiple of 2"]),
        ((1, 8, {"actor,reward": "all", "rollout": "0-8"}), {}, ["rollout", "device 8 does not exist", "0-7"]),
        ((1, 8, {"actor,reward": "all", "rollout": "0-3,3"}), {}, ["rollout", "device 3 is listed twice"]),
        ((1, 8, {"actor,reward": "all", "rollout": "7-4"}), {}, ["runs backwards", "4-7"]),
        ((1, 8, {"actor,reward": "all", "rollout": "0-3:0-1"}), {}, ["cannot read '0-3:0-1'", "0-3,8"]),
        ((1, 8, {"actor,reward": "all", "rollout": ""}), {}, ["rollout", "cannot read ''"]),
        ((1, 8, {"actor,rollout": "all"}), {}, ["reward has no devices", "`reward: all`"]),
        ((1, 8, {"actor,rollout,reward,actor": "all"}), {}, ["actor is placed twice"]),
        ((1, 8, {"actr,rollout,reward": "all"}), {}, ["unknown component 'actr'", "did you mean actor?"]),
        ((1, 8, {"actor,rollout,reward,inference": "all"}), {}, ["'inference'", "remove it"]),
        ((1, 2, ALL), dict(backend="local"), ["cluster.backend", "actor 2, rollout 2, reward 1"]),
    ],
)
def test_illegal_placements_name_the_key_and_the_remedy(args: tuple, kwargs: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        plan_of(*args, **kwargs)
    for word in ["cluster.component_placement"] * ("backend" not in kwargs) + words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        ("rollout", {"weight_transport": "broadcast"}, "rollout.weight_transport: broadcast .* use auto or disk"),
        ("algorithm", {"max_staleness": 1}, "algorithm.max_staleness: 1 lets engines generate .* give them devices of their own"),
    ],
)
def test_what_components_that_share_a_gpu_cannot_do_is_refused(section: str, settings: dict, words: str) -> None:
    config = config_of(1, 4, {"actor": "0-1", "rollout,reward": "2-3"})
    for name, value in settings.items():
        setattr(getattr(config, section), name, value)
    assert build_plan(config, nodes_of(config.cluster)).mode == "disaggregated"
    config.cluster.component_placement = {"actor": "0-2", "rollout,reward": "2-3"}
    with pytest.raises(UserError, match=words):
        build_plan(config, nodes_of(config.cluster))
    config.cluster.device = "cpu"
    assert build_plan(config, nodes_of(config.cluster)).mode == "hybrid"


def test_describe_names_every_node_and_the_layout() -> None:
    config = config_of(2, 8, {"actor": "4-15", "rollout,reward": "0-3"}, tp=2, rollout_tp=2)
    text = describe(build_plan(config, nodes_of(config.cluster)), config)
    assert "disaggregated" in text and "TP 2 x DP 6 x PP 1" in text and "2 sglang engine(s) of 2 device(s)" in text
    assert "node 0   actor 0-3 on 4-7 | rollout 0-1 on 0-3 | reward 0 on 0" in text and "node 1   actor 4-11 on 0-7" in text
    config = config_of(2, 2, ALL, tp=4)
    assert "1 TP group(s) cross nodes" in describe(build_plan(config, nodes_of(config.cluster)), config)
