"""Modules that stay in rewritten models."""
