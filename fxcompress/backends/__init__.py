"""Backends: what a rewritten graph is lowered to, and the safe file it is kept in."""

from __future__ import annotations

from .artifact import load as load
from .artifact import save as save
