"""Artifacts and lowering."""
