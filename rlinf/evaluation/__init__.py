"""Benchmarks of models: problems, samples, scores with intervals, comparisons. Built on the same workers as training."""
