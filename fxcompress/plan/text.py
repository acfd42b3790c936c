"""Numbers as plans show them."""

from __future__ import annotations

from ..passbase import VERBS, Pass
from ..policy.model import Action

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "k", "M", "G", "T")


def amount(value: float, unit: str = "") -> str:
    """`11.69 M`, `1.814 GMACs`, `44.63 MiB`: four digits; bytes in powers of 1024, all else of 1000."""
    names, base = (_BINARY, 1024) if unit == "B" else (_DECIMAL, 1000)
    place, scaled = 0, float(value)
    while abs(scaled) >= base and place + 1 < len(names):
        scaled, place = scaled / base, place + 1
    digits = f"{scaled:.4g}" if place else f"{scaled:g}"
    word = names[place] if unit == "B" else f"{names[place]}{unit}"
    return f"{digits} {word}".rstrip()


def percent(share: float) -> str:
    """0.5123 as `51.2%`."""
    return f"{100 * share:.3g}%"


def settings(action: Action) -> tuple[tuple[str, str], ...]:
    """The settings that the policy gives, as the language writes them, in the order of the verb's parameters."""
    verb: type[Pass] = VERBS[action.verb]
    return tuple((p.name, p.type.show(action.values[p.name])) for p in verb.parameters() if p.name in action.values)
