"""Rewrites and scores that verbs share."""
