"""What a user's kernel is made from, for the key of its compiled objects: equal keys mean equal code.

Of functions that come from a file it is the whole file; of others (a notebook's) their text and what
it names. Objects add their attributes, and partials their arguments. Nothing of it depends on paths,
or on whether the DSL is installed.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import numbers
import os
import struct
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any


class NoSource(Exception):
    """What code is made from cannot be told; says why."""


def _process_start() -> float:
    now = time.time()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        began = now - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return min(began, now) if since_boot > 0 else now


#: What modules were imported from is what their files hold now if these are older than this.
_STARTED = _process_start()


@dataclass(frozen=True)
class KernelSource:
    """A digest, empty where there is none for the reason `problem`, and the files that were read."""

    digest: str
    problem: str
    files: Mapping[Path, str]

    def changed(self) -> Path | None:
        """A file that is not what it was. The DSL reads functions' text when it compiles them."""
        for path, known in self.files.items():
            try:
                now = _hash(path)
            except OSError:
                return path
            if now != known:
                return path
        return None


def read(kernel: Any, values: Sequence[Any], sources: Sequence[Path]) -> KernelSource:
    """What a kernel, its variants' values and more files hold now. Raises OSError for a file of
    `sources` that cannot be read."""
    reader = _Reader()
    try:
        described = [reader.describe(kernel)]
        if not reader.sources:
            raise NoSource("its kernel has no source")
        described += [reader.value(v) for v in values]
        described += [reader.file(path, _loading(path)) for path in sources]
    except NoSource as why:
        return KernelSource("", str(why), reader.files)
    except RecursionError:
        return KernelSource("", "what its kernel holds is nested too deeply", reader.files)
    text = json.dumps(described)
    return KernelSource(hashlib.sha256(text.encode()).hexdigest(), "", reader.files)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _initializing(spec: Any) -> bool:
    return bool(getattr(spec, "_initializing", False))


def _loading(path: Path) -> bool:
    """Whether no module has read this file before now."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).name == path.name and Path(file).exists():
            if path.samefile(file):
                return _initializing(getattr(module, "__spec__", None))
    return True


def _top(x: Any) -> str:
    module = x.__name__ if isinstance(x, types.ModuleType) else getattr(x, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


def _standard(x: Any) -> bool:
    return _top(x) in sys.stdlib_module_names and _top(x) != "__main__"


def _has_file(c: type) -> bool:
    return bool(getattr(sys.modules.get(c.__module__), "__file__", None))


def _slots(c: type) -> list[str]:
    slots = vars(c).get("__slots__", ())
    listed = [slots] if isinstance(slots, str) else list(slots)
    return [s for s in listed if s not in ("__dict__", "__weakref__")]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


class _Reader:
    def __init__(self) -> None:
        self.files: dict[Path, str] = {}
        self.sources = 0  # functions whose source was found
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # so that ids stay theirs

    def file(self, path: Path, loading: bool) -> str:
        """The hash of a file that is what the program has read of it."""
        if path not in self.files:
            if not loading and path.stat().st_ctime > _STARTED:
                raise NoSource(f"{path} was written after the program started")
            self.files[path] = _hash(path)
        return self.files[path]

    def value(self, x: Any) -> Any:
        """A variant's value: plain, or an object with attributes, whatever its class."""
        if isinstance(x, enum.Enum) or not hasattr(x, "__dict__") or callable(x):
            return self.describe(x)
        return [type(x).__qualname__, self._attributes(x)]

    def describe(self, x: Any) -> Any:
        """A value as JSON. Raises NoSource where two different ones could look alike."""
        kind = type(x).__qualname__
        if isinstance(x, enum.Enum):
            return [kind, x.name]
        if x is None or isinstance(x, str | bytes | numbers.Number | PurePath | slice | range):
            return [kind, repr(x)]
        if type(x).__name__ in ("dtype", "device") and _top(type(x)) == "vibetensor":
            return [kind, repr(x)]
        if _top(x) == "cutlass":  # the DSL's, or what stands for it
            if (name := getattr(x, "__name__", None)) is None:
                raise NoSource(f"a {kind} of the DSL is part of its kernel")
            return ["dsl", name.rpartition(".")[2]]
        if isinstance(x, types.ModuleType):
            return ["module", x.__name__]
        if isinstance(x, types.BuiltinFunctionType) or (callable(x) and _standard(x)):
            if name := getattr(x, "__qualname__", None):
                return ["standard", _top(x), name]
        if id(x) in self._seen:
            return ["again", self._seen[id(x)]]
        self._seen[id(x)] = len(self._seen)
        self._held.append(x)
        return [kind, self._parts(x)]

    def _parts(self, x: Any) -> Any:
        if isinstance(x, Mapping):
            return [[self.describe(k), self.describe(v)] for k, v in x.items()]
        if isinstance(x, list | tuple):
            return [self.describe(v) for v in x]
        if isinstance(x, set | frozenset):
            return sorted(json.dumps(self.describe(v)) for v in x)
        if isinstance(x, functools.partial):
            return [self.describe(part) for part in (x.func, x.args, x.keywords)]
        if isinstance(x, types.MethodType):
            return [self.describe(x.__func__), self.describe(x.__self__)]
        if isinstance(x, staticmethod | classmethod):
            return self.describe(x.__func__)
        if isinstance(x, property):
            return [self.describe(f) for f in (x.fget, x.fset)]
        if isinstance(x, functools.cached_property):
            return self.describe(x.func)
        if isinstance(x, types.FunctionType):
            return self._function(inspect.unwrap(x))
        if isinstance(x, type):
            return [self._class(c) for c in x.__mro__ if c is not object]
        return [self.describe(type(x)), self._attributes(x)]

    def _attributes(self, x: Any) -> Any:
        names, of = dict(getattr(x, "__dict__", {})), type(x)
        slots = [s for c in of.__mro__ for s in _slots(c)]
        pointers = len(slots) + (of.__dictoffset__ > 0) + (of.__weakrefoffset__ > 0)
        room = object.__basicsize__ + pointers * struct.calcsize("P")
        if of.__basicsize__ > room or of.__itemsize__ or any(s.startswith("__") for s in slots):
            raise NoSource(
                f"its kernel holds a {of.__qualname__}, whose state Python does not show"
            )
        names |= {s: getattr(x, s) for s in slots if hasattr(x, s)}
        return [[n, self.describe(names[n])] for n in sorted(names)]

    def _function(self, f: Any) -> Any:
        if not isinstance(f, types.FunctionType):
            return self.describe(f)
        code = getattr(f, "_original_code", f.__code__)  # the DSL puts others in its place
        cells = []
        for cell in f.__closure__ or ():
            try:
                cells.append(self.describe(cell.cell_contents))
            except ValueError:  # not set yet
                cells.append(None)
        bound = [self.describe(f.__defaults__), self.describe(f.__kwdefaults__), cells]
        file = Path(f.__globals__.get("__file__") or "")
        if file.name == Path(code.co_filename).name and file.is_file():
            self.sources += 1
            text = self.file(file, _initializing(f.__globals__.get("__spec__")))
            return [f.__qualname__, text, bound, []]
        try:
            text = inspect.getsource(code)
        except (OSError, TypeError) as error:
            raise NoSource(f"{f.__qualname__} has no source") from error
        self.sources += 1
        named = [n for n in sorted(set(_names(code))) if n in f.__globals__]
        named = [[n, self.describe(f.__globals__[n])] for n in named]
        return [f.__qualname__, text, bound, named]

    def _class(self, c: type) -> Any:
        if _standard(c) or _top(c) == "cutlass":
            return c.__qualname__
        members = []
        for name, member in sorted(vars(c).items()):
            special = name.startswith("__")
            inner = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            if not isinstance(inner, types.FunctionType | property | functools.cached_property):
                if special or name.startswith("_abc_") or inspect.ismemberdescriptor(member):
                    continue
            elif special and isinstance(inner, types.FunctionType):
                code = getattr(inspect.unwrap(inner), "__code__", None)
                made = _standard(inner) or (code is not None and code.co_filename == "<string>")
                if made and "__dataclass_fields__" in vars(c):  # its fields tell
                    continue
            try:
                members.append([name, self.describe(member)])
            except NoSource:
                # What an assignment in a file makes is as the file says.
                if isinstance(inner, types.FunctionType) or not _has_file(c):
                    raise
        return [c.__qualname__, members]
