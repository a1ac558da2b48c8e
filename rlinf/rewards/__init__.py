"""Verdicts: tasks, rewards, and the process cage in which untrusted answers are judged."""
