"""Verdicts: extraction, equivalence, and the process cage in which untrusted answers are judged."""
