"""Process groups of a role, as its ranks have them before the first step."""

from __future__ import annotations

from typing import Any

from rlinf.checks.rank_pool import RankPool


def ranks_that_met(at: Any) -> list[list[int]]:
    import torch
    import torch.distributed as dist

    from rlinf.training import parallel

    met, original = [], dist.all_reduce

    def counted(value: torch.Tensor, *args: Any, group: dist.ProcessGroup) -> None:
        original(value, *args, group=group)
        members = dist.get_process_group_ranks(group)
        assert value.item() == len(members)
        met.append(members)

    dist.all_reduce = counted
    try:
        parallel.meet(torch.device("cpu"))
    finally:
        dist.all_reduce = original
    return met


def test_all_groups_of_a_rank_have_met_before_the_first_step(rank_pool: RankPool) -> None:
    """The world, tensor parallel, pipeline parallel; a group of one has nobody to meet."""
    met = rank_pool.run(ranks_that_met, ranks=4, tp=2, pp=2)
    for rank, groups in enumerate(met):
        pairs = [group for group in groups if len(group) == 2]
        assert [0, 1, 2, 3] in groups and sorted(pairs) == sorted([[rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]])
    assert [[len(group) for group in groups] for groups in met] == [[len(group) for group in met[0]]] * 4  # in one order


def test_a_role_meets_when_it_is_started(monkeypatch: Any) -> None:
    from rlinf.training import parallel

    called: list[object] = []
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: called.append("joined"))
    monkeypatch.setattr(parallel, "set_layout", lambda *layout: called.append(layout) or "at")
    monkeypatch.setattr(parallel, "meet", called.append)
    device = parallel.torch.device("cuda", 0)
    assert parallel.initialize(2, 1, rank=0, world_size=2, device=device, address="127.0.0.1:1") == "at"
    assert called == ["joined", (2, 1, 1), device]
