"""Captured graphs: the normal form, facts, channel coupling, selection and verification."""

from __future__ import annotations

from .capture import capture as capture
from .captured import Captured as Captured
from .captured import Example as Example
