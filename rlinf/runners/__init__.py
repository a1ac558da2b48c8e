"""The loops: one page each."""
