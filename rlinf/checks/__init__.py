"""Proofs of this platform as commands: they run on a laptop, print a table and exit 1 when a claim does not hold."""
