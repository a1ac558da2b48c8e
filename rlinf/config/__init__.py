"""Typed configuration: schema, loading with provenance, validation, explanation. Starts nothing, imports nothing of ours."""
