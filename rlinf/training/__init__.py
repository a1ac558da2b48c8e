"""The Megatron-core training engine: the only room that imports megatron."""

from rlinf.training import cpu as _cpu  # noqa: F401  (before anything here imports megatron: without CUDA it makes that possible)
