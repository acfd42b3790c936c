"""Report, diff, explain: what was done, for people."""
