"""Prints what is wrong with what listens at an address, or nothing when it is a head that start_ray.sh started and that takes the token of
this environment: python -m rlinf.cluster.head_probe HOST:PORT. head.py runs it."""

from __future__ import annotations

import sys

from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled code
from ray.exceptions import AuthenticationError, RpcError

from rlinf.cluster.state import RANK_LABEL


def strangeness(address: str) -> str:
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=10)
    except AuthenticationError:
        return f"the head at {address} does not take the token: it is another cluster's"
    except RpcError as error:
        return f"what listens at {address} does not answer like Ray: {error}"
    if not any(node.labels.get(RANK_LABEL) == "0" for node in nodes.values()):
        return f"the Ray at {address} has no node that start_ray.sh started with RANK=0"
    return ""


if __name__ == "__main__":
    sys.stdout.write(strangeness(sys.argv[1]))
