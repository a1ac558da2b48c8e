"""Weights on the move: tensor specs, HF <-> Megatron mapping, buckets, sources, receipts."""
