"""Runs PTX on the CPU: enough of the virtual machine for kernels that use no tensor cores.

A block's threads are the lanes of NumPy arrays. Of the instructions that threads stand at, the one
first in the text runs next, for all threads that stand there, so threads that parted meet again. What
the hardware would leave undefined is an error here: an access outside the tensors given, a misaligned
one, a shuffle that not all threads of a warp reach, a barrier that some threads have passed by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

WARP = 32
_BITS = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "bf16": 16, "f16": 16,
         "b32": 32, "u32": 32, "s32": 32, "f32": 32, "bf16x2": 32, "f16x2": 32,
         "b64": 64, "u64": 64, "s64": 64, "f64": 64}  # fmt: skip


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _typed(raw: np.ndarray, kind: str) -> np.ndarray:
    """Register bits as numbers."""
    if kind == "pred":
        return raw
    if kind == "bf16":
        return bfloat16_values(raw.astype(np.uint16))
    if kind.endswith("x2"):
        return raw.astype(np.uint32)
    bits = _BITS[kind]
    low = raw.astype(f"u{bits // 8}")
    return low.view(f"{ {'b': 'u', 'u': 'u', 's': 'i', 'f': 'f'}[kind[0]] }{bits // 8}")


def _raw(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as register bits."""
    if kind == "pred":
        return np.asarray(values, bool)
    if kind == "bf16":
        return bfloat16_bits(values).astype(np.uint64)
    if kind.endswith("x2"):
        return np.asarray(values).astype(np.uint64)
    bits = _BITS[kind]
    code = {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    with np.errstate(all="ignore"):
        cast = np.ascontiguousarray(np.asarray(values).astype(f"{code}{bits // 8}"))
    return cast.view(f"u{bits // 8}").astype(np.uint64)


class Memory:
    """One arena for all tensors, poisoned between and inside what is not given."""

    BASE = 0x7F0000000000

    def __init__(self) -> None:
        self.bytes = np.full(1 << 12, 0xFF, np.uint8)
        self.valid = np.zeros(1 << 12, bool)
        self.end = 256

    def place(self, array: np.ndarray, offset: int = 0) -> int:
        """Copies an array in, `offset` bytes after a 256-byte boundary; its address."""
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        start = -(-self.end // 256) * 256 + offset
        self.end = start + len(data) + 256
        if self.end > len(self.bytes):
            grow = max(self.end, 2 * len(self.bytes)) - len(self.bytes)
            self.bytes = np.concatenate([self.bytes, np.full(grow, 0xFF, np.uint8)])
            self.valid = np.concatenate([self.valid, np.zeros(grow, bool)])
        self.bytes[start : start + len(data)] = data
        self.valid[start : start + len(data)] = True
        return self.BASE + start

    def read(self, address: int, like: np.ndarray) -> np.ndarray:
        at = address - self.BASE
        return np.frombuffer(self.bytes[at : at + like.nbytes].tobytes(), like.dtype).reshape(
            like.shape
        )


@dataclass
class Instruction:
    text: str
    guard: tuple[str, bool] | None
    name: list[str]
    operands: list[str]


def parse(ptx: str) -> tuple[str, list[tuple[str, int]], list[Instruction], dict[str, int], int]:
    """Kernel name, parameters (name, size), instructions, labels, bytes of shared memory."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.S)
    assert head is not None
    parameters = []
    for line in head[2].split(","):
        if m := re.search(r"\.param\s+(?:\.align \d+\s+)?\.(\w+)\s+(?:\.ptr[^%]*?)?(\w+)(?:\[(\d+)\])?\s*$", line.strip()):  # fmt: skip
            parameters.append((m[2], int(m[3]) if m[3] else _BITS[m[1]] // 8))
    body = ptx[ptx.index("{", head.end()) + 1 :]
    program: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.split(r";|(?<=:)\s*\n|\n(?=\$)", body):
        line = line.strip().strip("{}").strip() if line.strip() in ("{", "}") else line.strip()
        line = re.sub(r"^[{}]\s*(?=[.a-z@$])", "", line).strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(program)
            continue
        if not line or line.startswith(".") or line == "}":
            continue
        guard = None
        if m := re.match(r"@(!?)(%p\d+)\s+", line):
            guard = (m[2], m[1] == "!")
            line = line[m.end() :]
        name, rest = (line.split(None, 1) + [""])[:2]
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest.strip())
        program.append(Instruction(line, guard, name.split("."), [o.strip() for o in operands]))
    sizes = re.findall(r"\.shared\s+(?:\.align \d+\s+)?\.b8\s+\w+\[(\d+)\]", ptx)
    return head[1], parameters, program, labels, sum(map(int, sizes))


class Block:
    """One block of threads."""

    def __init__(self, source: tuple, parameters: bytes, memory: Memory, block: tuple[int, int, int],
                 threads: tuple[int, int, int], grid: tuple[int, int, int]):  # fmt: skip
        _, self.layout, self.program, self.labels, shared = source
        self.memory = memory
        self.count = int(np.prod(threads))
        assert self.count % WARP == 0
        ids = np.arange(self.count, dtype=np.uint64)
        self.special = {
            "%tid.x": ids % threads[0],
            "%tid.y": ids // threads[0] % threads[1],
            "%tid.z": ids // (threads[0] * threads[1]),
            "%laneid": ids % WARP,
        }
        for axis, b, t, g in zip("xyz", block, threads, grid):
            self.special[f"%ctaid.{axis}"] = np.full(self.count, b, np.uint64)
            self.special[f"%ntid.{axis}"] = np.full(self.count, t, np.uint64)
            self.special[f"%nctaid.{axis}"] = np.full(self.count, g, np.uint64)
        self.registers: dict[str, np.ndarray] = {}
        self.shared = np.full(max(shared, 1024), 0xFF, np.uint8)
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.offsets, at = {}, 0
        for name, size in self.layout:
            at = (
                -(-at // min(size & -size, 8)) * min(size & -size, 8)
                if size < 8
                else -(-at // 8) * 8
            )
            self.offsets[name] = at
            at += size
        self.trapped = False

    def get(self, operand: str, kind: str) -> np.ndarray:
        """An operand's value for all threads."""
        if operand.startswith("%"):
            raw = self.special.get(operand)
            if raw is None:
                raw = self.registers.get(operand)
            if raw is None:
                raise KeyError(f"{operand} is read before it is written")
            return _typed(raw, kind)
        if operand.startswith(("0f", "0F")) or operand.startswith(("0d", "0D")):
            raw = np.full(self.count, int(operand[2:], 16), np.uint64)
        elif re.fullmatch(r"-?\d+|-?0x[0-9a-fA-F]+", operand):
            raw = np.full(self.count, int(operand, 0) & (2**64 - 1), np.uint64)
        else:
            raw = np.zeros(self.count, np.uint64)  # the one array in shared memory
        if kind == "pred":
            return raw.astype(bool)
        return _typed(raw, kind)

    def put(self, register: str, values: np.ndarray, kind: str, active: np.ndarray) -> None:
        if register == "_":
            return
        raw = _raw(np.broadcast_to(values, (self.count,)), kind)
        old = self.registers.get(register)
        if old is None:
            old = np.zeros(self.count, raw.dtype)
        self.registers[register] = np.where(active, raw, old)

    def run(self) -> None:
        program, end = self.program, len(self.program)
        at = np.zeros(self.count, np.int64)
        waiting = np.zeros(self.count, bool)
        steps = 0
        while not self.trapped:
            alive = at < end
            if not alive.any():
                return
            runnable = alive & ~waiting
            if not runnable.any():
                # Everybody alive waits at a barrier; threads that have ended count as arrived.
                places = set(at[waiting].tolist())
                assert len(places) == 1, f"threads wait at different barriers: {places}"
                waiting[:] = False
                at[alive] += 1
                continue
            here = int(at[runnable].min())
            active = runnable & (at == here)
            instruction = program[here]
            if instruction.guard is not None:
                register, inverted = instruction.guard
                active = active & (self.registers[register] ^ inverted)
            standing = runnable & (at == here)
            name = instruction.name[0]
            if name == "bra":
                at[standing] += 1
                at[active] = self.labels[instruction.operands[0]]
            elif name in ("ret", "exit"):
                at[standing] += 1
                at[active] = end
            elif name in ("bar", "barrier"):
                if "warp" in instruction.name:
                    at[standing] += 1
                else:
                    waiting |= active
            else:
                if active.any():
                    try:
                        self.execute(instruction, active)
                    except Exception as error:
                        raise RuntimeError(f"{instruction.text}: {error}") from error
                at[standing] += 1
            steps += 1
            assert steps < 2_000_000, "the kernel does not end"

    def execute(self, i: Instruction, active: np.ndarray) -> None:
        name = i.name[0]
        handler: Callable[[Instruction, np.ndarray], None] | None = getattr(self, f"_{name}", None)
        if handler is not None:
            handler(i, active)
            return
        kind = i.name[-1]
        if name in _ARITHMETIC:
            sources = [self.get(o, kind) for o in i.operands[1:]]
            with np.errstate(all="ignore"):
                self.put(i.operands[0], _ARITHMETIC[name](i.name, *sources), kind, active)
            return
        raise NotImplementedError("this machine has no such instruction")

    def _fence(self, i: Instruction, active: np.ndarray) -> None:
        pass

    _membar = _fence

    def _trap(self, i: Instruction, active: np.ndarray) -> None:
        self.trapped = True

    def _mov(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        target, source = i.operands
        if target.startswith("{"):
            parts = [p.strip() for p in target[1:-1].split(",")]
            width = _BITS[kind] // len(parts)
            # A vector that is filled element by element begins undefined: poison, as memory does.
            if source not in self.registers:
                self.put(source, np.full(self.count, -1), kind.replace("b", "s"), active)
            value = self.get(source, kind).astype(np.uint64)
            for k, part in enumerate(parts):
                piece = (value >> np.uint64(width * k)) & np.uint64((1 << width) - 1)
                self.put(part, piece, f"b{width}", active)
        elif source.startswith("{"):
            parts = [p.strip() for p in source[1:-1].split(",")]
            width = _BITS[kind] // len(parts)
            value = np.zeros(self.count, np.uint64)
            for k, part in enumerate(parts):
                piece = self.get(part, f"b{width}").astype(np.uint64)
                value |= piece << np.uint64(width * k)
            self.put(target, value, kind, active)
        else:
            self.put(target, self.get(source, kind), kind, active)

    def _cvt(self, i: Instruction, active: np.ndarray) -> None:
        to, of = i.name[-2:]
        if to == "bf16x2":
            high, low = (bfloat16_bits(self.get(o, of)).astype(np.uint64) for o in i.operands[1:])
            self.put(i.operands[0], high << np.uint64(16) | low, "b32", active)
            return
        if to == "f16x2":
            high, low = (_raw(self.get(o, of), "f16") for o in i.operands[1:])
            self.put(i.operands[0], high << np.uint64(16) | low, "b32", active)
            return
        value = self.get(i.operands[1], of)
        if to[0] in "us" and of[0] == "f":
            value = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[i.name[1]](
                value
            )
        self.put(i.operands[0], value, to, active)

    def _setp(self, i: Instruction, active: np.ndarray) -> None:
        compare, kind = i.name[1], i.name[-1]
        a, b = (self.get(o, kind) for o in i.operands[1:3])
        unordered = np.isnan(a) | np.isnan(b) if kind[0] == "f" else np.zeros(self.count, bool)
        base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge", "num": "num", "nan": "nan"}.get(
            compare, compare[:2]
        )
        if base == "num":
            result = ~unordered
        elif base == "nan":
            result = unordered
        else:
            result = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b,
                      "ne": a != b}[base]  # fmt: skip
            result = result | unordered if compare.endswith("u") else result & ~unordered
        self.put(i.operands[0], result, "pred", active)

    def _selp(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        a, b = (self.get(o, kind) for o in i.operands[1:3])
        self.put(i.operands[0], np.where(self.get(i.operands[3], "pred"), a, b), kind, active)

    def _mul(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        a, b = (self.get(o, kind) for o in i.operands[1:3])
        with np.errstate(all="ignore"):
            if "wide" in i.name:
                wide = f"{kind[0]}{2 * _BITS[kind]}"
                result = a.astype(f"{'i' if kind[0] == 's' else 'u'}8") * b
                self.put(i.operands[0], result, wide, active)
            elif "hi" in i.name:
                assert _BITS[kind] == 32
                result = (a.astype("i8" if kind[0] == "s" else "u8") * b) >> 32
                self.put(i.operands[0], result, kind, active)
            else:
                self.put(i.operands[0], a * b, kind, active)

    def _mad(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        a, b = (self.get(o, kind) for o in i.operands[1:3])
        if "wide" in i.name:
            kind = f"{kind[0]}{2 * _BITS[kind]}"
            code = "i8" if kind[0] == "s" else "u8"
            a, b = a.astype(code), b.astype(code)
        with np.errstate(all="ignore"):
            self.put(i.operands[0], a * b + self.get(i.operands[3], kind), kind, active)

    def _bfi(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        a, b = (self.get(o, kind).astype(np.uint64) for o in i.operands[1:3])
        start, length = (self.get(o, "u32").astype(np.uint64) for o in i.operands[3:5])
        mask = ((np.uint64(1) << length) - np.uint64(1)) << start
        self.put(i.operands[0], (b & ~mask) | ((a << start) & mask), kind, active)

    def _shl(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        a, by = self.get(i.operands[1], kind), self.get(i.operands[2], "u32")
        shifted = a.astype(np.uint64) << by.astype(np.uint64)
        self.put(i.operands[0], np.where(by >= _BITS[kind], 0, shifted), kind, active)

    def _shr(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        a, by = self.get(i.operands[1], kind), self.get(i.operands[2], "u32")
        by = np.minimum(by, _BITS[kind] - 1 if kind[0] == "s" else 63).astype(a.dtype)
        shifted = a >> by
        self.put(i.operands[0], shifted, kind, active)

    def _shfl(self, i: Instruction, active: np.ndarray) -> None:
        lanes = active.reshape(-1, WARP)
        assert (lanes.all(1) | ~lanes.any(1)).all(), "part of a warp is missing at a shuffle"
        value = self.get(i.operands[1], "b32").reshape(-1, WARP)
        by = self.get(i.operands[2], "u32").reshape(-1, WARP).astype(np.int64)
        lane = np.arange(WARP)
        source = {"bfly": lane ^ by, "idx": by % WARP, "down": lane + by, "up": lane - by}[
            i.name[2]
        ]
        source = np.where((source < 0) | (source >= WARP), lane, source)
        result = np.take_along_axis(value, source, 1).reshape(-1)
        self.put(i.operands[0].partition("|")[0], result, "b32", active)

    def _place(self, operand: str) -> tuple[np.ndarray, str]:
        inner = operand[1:-1]
        base, _, offset = inner.partition("+")
        base = base.strip()
        add = int(offset or 0)
        if base in self.offsets:
            return np.full(self.count, self.offsets[base] + add, np.int64), "param"
        address = self.get(base, "u64") if base.startswith("%") else np.zeros(self.count, np.uint64)
        return address.astype(np.int64) + add, "memory"

    def _cells(self, i: Instruction, operand: str, active: np.ndarray, size: int) -> tuple:
        """The bytes an access touches: the storage, and indices of the active threads."""
        address, _ = self._place(operand)
        address = address[active]
        assert (address % size == 0).all(), f"misaligned for {size} bytes"
        if "param" in i.name:
            return self.parameters, address
        if "shared" in i.name:
            address = address & 0xFFFFFF
            assert (address + size <= len(self.shared)).all(), "outside shared memory"
            return self.shared, address
        at = address - Memory.BASE
        inside = (at >= 0) & (at + size <= len(self.memory.bytes))
        assert inside.all(), "outside all memory"
        cells = at[:, None] + np.arange(size)
        assert self.memory.valid[cells].all(), "outside the tensors"
        return self.memory.bytes, at

    def _ld(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        width = _BITS[kind] // 8
        targets = [t.strip() for t in i.operands[0].strip("{}").split(",")]
        storage, at = self._cells(i, i.operands[1], active, width * len(targets))
        for k, target in enumerate(targets):
            cells = at[:, None] + width * k + np.arange(width)
            loaded = np.ascontiguousarray(storage[cells]).view(f"u{width}")[:, 0]
            value = np.zeros(self.count, np.uint64)
            value[active] = loaded.astype(np.uint64)
            if kind[0] == "s" and width < 8:  # into a wider register
                value = _typed(value, kind).astype(np.int64).astype(np.uint64)
                self.put(target, value, "b64", active)
            else:
                self.put(target, value, "b64", active)

    def _st(self, i: Instruction, active: np.ndarray) -> None:
        kind = i.name[-1]
        width = _BITS[kind] // 8
        sources = [s.strip() for s in i.operands[1].strip("{}").split(",")]
        storage, at = self._cells(i, i.operands[0], active, width * len(sources))
        for k, source in enumerate(sources):
            value = self.get(source, f"b{8 * width}")[active].astype(f"u{width}")
            cells = at[:, None] + width * k + np.arange(width)
            storage[cells] = value[:, None].view(np.uint8).reshape(-1, width)


def _fused(names: list[str], a: Any, b: Any, c: Any) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _packed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Lifts arithmetic over the pairs of bf16x2; f16x2 likewise."""

    def apply(names: list[str], *sources: np.ndarray) -> np.ndarray:
        kind = names[-1]
        if kind not in ("bf16x2", "f16x2"):
            return function(names, *sources)
        half = kind[:-2]
        out = np.zeros(len(sources[0]), np.uint64)
        for shift in (0, 16):
            parts = [
                _typed((s.astype(np.uint64) >> np.uint64(shift)) & np.uint64(0xFFFF), half).astype(
                    np.float32
                )
                for s in sources
            ]
            out |= _raw(function(names, *parts), half) << np.uint64(shift)
        return out

    return apply


def _max(names: list[str], a: Any, b: Any) -> np.ndarray:
    return np.maximum(a, b) if "NaN" in names or a.dtype.kind != "f" else np.fmax(a, b)


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": _packed(lambda n, a, b: a + b),
    "sub": _packed(lambda n, a, b: a - b),
    "fma": _packed(_fused),
    "div": lambda n, a, b: a / b,
    "neg": lambda n, a: -a,
    "abs": lambda n, a: np.abs(a),
    "copysign": lambda n, a, b: np.copysign(b, a),
    "max": _max,
    "min": lambda n, a, b: np.minimum(a, b) if "NaN" in n or a.dtype.kind != "f" else np.fmin(a, b),
    "and": lambda n, a, b: a & b,
    "or": lambda n, a, b: a | b,
    "xor": lambda n, a, b: a ^ b,
    "not": lambda n, a: ~a,
    "ex2": lambda n, a: np.exp2(a),
    "lg2": lambda n, a: np.log2(a),
    "rcp": lambda n, a: 1 / a,
    "sqrt": lambda n, a: np.sqrt(a),
    "rsqrt": lambda n, a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
}


def launch(ptx: str, parameters: bytes, memory: Memory, grid: tuple[int, int, int],
           threads: tuple[int, int, int]) -> bool:  # fmt: skip
    """Runs all blocks, one after another. False where one trapped."""
    source = parse(ptx)
    for block in _blocks(grid):
        one = Block(source, parameters, memory, block, threads, grid)
        one.run()
        if one.trapped:
            return False
    return True


def _blocks(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z
