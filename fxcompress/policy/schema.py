"""The door to the registries of `passbase`: which verbs there are, and what names a registered type knows.

`passbase` declares parameters with the types of this package, so it can't be imported from here at the top: it is
looked up when a policy is checked. This is the one place where the language asks what lies above it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..passbase import Pass


def _registry(name: str) -> Any:
    return getattr(import_module("fxcompress.passbase"), name)


def verb(name: str) -> type[Pass] | None:
    """The class of a verb, or None. Raises FxcError where an installed package offers it and can't be loaded."""
    try:
        found: type[Pass] = _registry("VERBS")[name]
    except KeyError:
        return None
    return found


def verb_names() -> list[str]:
    """Every verb that can be written, sorted."""
    return list(_registry("VERBS").names())


def is_registered(registry: str, name: str) -> bool:
    """Whether `name` is in one of passbase's registries, such as `SCORES`; nothing of it is loaded."""
    return name in _registry(registry)


def registered(registry: str) -> list[str]:
    """The names in one of passbase's registries."""
    return list(_registry(registry).names())
