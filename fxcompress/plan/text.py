"""Numbers as plans show them."""

from __future__ import annotations

from ..policy.units import show_percent
from .lower import Step

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


def settings(step: Step) -> tuple[tuple[str, str], ...]:
    """The setting that was solved, and those that the policy gives, as the language writes them, in the order of the
    verb's parameters."""
    values, found = step.action.values, step.solved
    shown = {p.name: p.type.show(values[p.name]) for p in step.pass_.parameters() if p.name in values}
    if found is not None:
        share = "(known when it is carried out)" if found.share is None else show_percent(found.share)
        shown = {found.name: f"{share} (solved for {found.why})", **shown}
    return tuple(shown.items())
