"""Metric names, timers and logger backends."""
