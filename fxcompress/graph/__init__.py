"""Captured graphs: the normal form, facts, channel coupling, selection and verification."""
