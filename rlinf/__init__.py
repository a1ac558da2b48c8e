"""rlinf: distributed reinforcement learning of reasoning models, from a laptop to a cluster.

Importing this package imports nothing heavy: torch, ray, megatron and sglang are loaded by the rooms that use them.
"""

__version__ = "0.1.0"
