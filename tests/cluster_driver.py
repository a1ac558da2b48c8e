"""A small run for the tests of death: python -m tests.cluster_driver LOG_DIR RUN_ID busy|idle|stuck

Launches two `actor` and one `rollout` worker (and a stubborn grandchild), prints one JSON line of pids, and waits for its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.phase import Phase
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed
from rlinf.scheduling.placement import Plan, Seat

PLAN = Plan((Seat("actor", 0, 0, (0,)), Seat("actor", 1, 0, (1,)), Seat("rollout", 0, 0, (0,))), "hybrid")


async def loop(cluster: Cluster, mode: str) -> None:
    actor = cluster.launch(PLAN, "actor", "tests.cluster_workers:Plain")
    rollout = cluster.launch(PLAN, "rollout", "tests.cluster_workers:Async")
    told = await actor.call_all("describe")
    grandchild = await actor.call(1, "spawn")
    header, _ = await rollout.call(0, "generate", 1, returns=2)
    cluster.phase = Phase("training")
    work = [asyncio.ensure_future(c) for c in (actor.call_all("sleep", 120.0), rollout.call(0, "forever"))] if mode != "idle" else []
    await asyncio.sleep(0.2)
    print(json.dumps({"actor": [d["pid"] for d in told], "rollout": header["pid"], "grandchild": grandchild}), flush=True)
    if mode == "stuck":
        time.sleep(120)
    await asyncio.gather(asyncio.sleep(120), *work)


def main() -> int:
    config = ClusterConfig(num_gpus_per_node=2, device="cpu", threads_per_worker=1, start_timeout=60)
    cluster = Cluster.connect(config, sys.argv[2], Path(sys.argv[1]))
    try:
        asyncio.run(cluster.guard(loop(cluster, sys.argv[3])))
    except RunFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
