"""Texts from files, and the presets that `use` brings in: from `std/` of this package, or from beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from ..diagnostics import Diagnostic, Fix, Label, PolicyError, Sink, nearest
from ..source import Source, Span
from . import ast
from .parsing import parse_file
from .words import quoted

STD = "std/"
MAX_DEEP = 32  # files that use each other


@dataclass(frozen=True)
class Preset:
    """`preset name for verb { key = value }`, its values checked against the verb's parameters."""

    name: str
    verb: str
    values: Mapping[str, object]
    spans: Mapping[str, Span]
    span: Span


def read_source(path: Path) -> Source:
    """The text of a file, which must be UTF-8; a byte-order mark is dropped. Raises PolicyError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PolicyError([Diagnostic("FXC0016", f"`{path}` can't be read: {error.strerror or error}",
                                      help="give the path of a policy file")]) from error
    except ValueError as error:  # a NUL in the path
        raise PolicyError([Diagnostic("FXC0016", f"{str(path)!r} is no path: {error}",
                                      help="give the path of a policy file")]) from error
    return decode(data, str(path))


def decode(data: bytes, name: str) -> Source:
    """The text of `data`. Raises PolicyError at the first byte that is not UTF-8."""
    try:
        return Source(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        before = data[:error.start].decode("utf-8-sig", errors="replace")
        readable = Source(name, before + "\ufffd")
        place = Label(readable.span(len(before), len(before) + 1), f"byte 0x{data[error.start]:02x}")
        raise PolicyError([Diagnostic("FXC0001", "this text is not UTF-8", place,
                                      help="save the file as UTF-8")]) from error


def identity(source: Source) -> str:
    """One name for one file, by whatever path it was reached."""
    return source.name if source.name.startswith(STD) else str(Path(source.name).resolve())


@dataclass
class Library:
    """Reads used files, each once. `seen` has their presets by resolved path, None while their own uses are
    followed."""

    sink: Sink
    seen: dict[str, dict[str, ast.PresetDecl] | None] = field(default_factory=dict)

    def use(self, use: ast.Use, source: Source) -> list[ast.PresetDecl]:
        """The presets that a `use` statement of `source` brings in; errors go to the sink."""
        found = self._file(use, source)
        if found is None:
            return []
        if use.names is None:
            if not found:
                self.sink.error("FXC0121", f'"{use.path.value}" has no presets', use.path.span, "nothing to use",
                                help="name a file that declares `preset ... for ... { }`")
            return list(found.values())
        presets = []
        for name in use.names:
            if name.text in found:
                presets.append(found[name.text])
                continue
            known = nearest(name.text, found, 1)
            self.sink.error("FXC0121", f'"{use.path.value}" has no preset `{name.text}`', name.span, "not there",
                            notes=(f"it has {quoted(found, 'and')}",) if found else (),
                            help=f"did you mean `{known[0]}`?" if known else "name a preset of the file",
                            fixes=(Fix(name.span, known[0]),) if known else ())
        return presets

    def _file(self, use: ast.Use, source: Source) -> dict[str, ast.PresetDecl] | None:
        loaded = self._load(use, source)
        if loaded is None:
            return None
        key = identity(loaded)
        if key not in self.seen:
            if list(self.seen.values()).count(None) >= MAX_DEEP:
                self.sink.error("FXC0008", f"files use each other more than {MAX_DEEP} deep", use.path.span,
                                "one too many",
                                help="use the last files from the policy itself")
                return None
            self.seen[key] = None
            self.seen[key] = self._presets(loaded)
        found = self.seen[key]
        if found is None:
            self.sink.error("FXC0120", f'"{use.path.value}" uses itself', use.path.span, "comes back to this file",
                            help="move the presets that both need into a third file")
        return found

    def _load(self, use: ast.Use, source: Source) -> Source | None:
        """The used text. A path is relative to the file that uses it; `std/...` is the package's own."""
        name = use.path.value
        inside_std = source.name.startswith(STD)
        if name.startswith(STD) or inside_std:
            standard = _standard()
            wanted = name if name.startswith(STD) else STD + name
            if wanted in standard:
                return Source(wanted, standard[wanted])
            known = nearest(wanted, standard, 1)
            self.sink.error("FXC0119", f'there is no "{wanted}" in the standard library', use.path.span, "not found",
                            notes=(f"it has {', '.join(standard)}",),
                            help=f'did you mean "{known[0]}"?' if known else "use one of these files",
                            fixes=(Fix(use.path.span, f'"{known[0]}"'),) if known else ())
            return None
        path = Path(source.name).parent / name
        try:
            return read_source(path)
        except PolicyError as error:
            reason = error.diagnostics[0].message
            self.sink.error("FXC0119", f'"{name}" can\'t be used: {reason}', use.path.span, "not read",
                            help="a path is relative to the file that it stands in; `std/...` is the standard library")
            return None

    def _presets(self, source: Source) -> dict[str, ast.PresetDecl]:
        """The presets of a used file, with those that it uses itself. A policy in it is left alone."""
        parsed = parse_file(source)
        self.sink.items.extend(parsed.diagnostics)
        found: dict[str, ast.PresetDecl] = {}
        for item in parsed.file.items:
            if isinstance(item, ast.Use):
                found.update({preset.name.text: preset for preset in self.use(item, source)})
            elif isinstance(item, ast.PresetDecl):
                found[item.name.text] = item
        return found


def _standard() -> dict[str, str]:
    """The files of the standard library by the name `use` calls them."""
    folder = files("fxcompress.policy") / "std"
    return {STD + entry.name: entry.read_text(encoding="utf-8")
            for entry in sorted(folder.iterdir(), key=lambda entry: entry.name) if entry.name.endswith(".fxc")}
