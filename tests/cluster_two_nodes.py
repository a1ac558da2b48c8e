"""A small run over two nodes of a Ray cluster that is up: python -m tests.cluster_two_nodes LOG_DIR RUN_ID [wait]"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.phase import Phase
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed
from rlinf.scheduling.placement import Plan, Seat

PLAN = Plan(tuple(Seat("actor", r, r // 2, (r % 2,)) for r in range(4)) + tuple(Seat("rollout", r, r, (0,)) for r in range(2)), "hybrid")


async def loop(cluster: Cluster, wait: bool) -> None:
    actor = cluster.launch(PLAN, "actor", "tests.cluster_workers:Collective")
    rollout = cluster.launch(PLAN, "rollout", "tests.cluster_workers:Async")
    totals = await actor.call_all("total")
    told = await actor.call_all("describe")
    payloads = [rollout.ref(rank, "generate", 200_000, returns=2)[1] for rank in range(2)]
    sums = await actor.call_all("sum_of", *payloads)
    cluster.phase = Phase("training")
    report = {
        "totals": [t for t, _ in totals],
        "node_of_rank": [d["env"]["RLINF_TEST_NODE"] for d in told],
        "sums": sums,
        "local_ranks": [d["env"]["LOCAL_RANK"] for d in told],
        "homes": [d["env"]["HOME"] for d in told],
    }
    print(json.dumps(report), flush=True)
    if wait:
        await asyncio.sleep(120)


def main() -> int:
    config = ClusterConfig(num_nodes=2, num_gpus_per_node=2, device="cpu", threads_per_worker=1, start_timeout=60)
    cluster = Cluster.connect(config, sys.argv[2], Path(sys.argv[1]))
    try:
        asyncio.run(cluster.guard(loop(cluster, wait="wait" in sys.argv)))
    except RunFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
