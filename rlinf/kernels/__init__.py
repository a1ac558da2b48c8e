"""Kernels of our own: C for CPUs (`cpu`, `rowwise`), Triton for GPUs (`head_triton`). Each has an equal in torch's operations."""
