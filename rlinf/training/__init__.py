"""The Megatron-core training engine: the only room that imports megatron."""
