"""How tensors print: torch's format, with summaries for large ones."""

from __future__ import annotations

import math
from typing import Any

from vibetensor import _C


class _Options:
    precision = 4
    threshold = 1000.0
    edgeitems = 3
    linewidth = 80
    sci_mode: bool | None = None


_options = _Options()


def set_printoptions(
    precision: int | None = None,
    threshold: float | None = None,
    edgeitems: int | None = None,
    linewidth: int | None = None,
    profile: str | None = None,
    sci_mode: bool | None = None,
) -> None:
    """Sets how tensors print.

    precision: digits after the point (4). threshold: elements above which a tensor is summarised
    (1000). edgeitems: items shown at each end of a summarised dimension (3). linewidth: characters
    a line (80). profile: 'default', 'short' or 'full'. sci_mode: force scientific notation on or off.
    """
    profiles = {
        "default": (4, 1000.0, 3, 80),
        "short": (2, 1000.0, 2, 80),
        "full": (4, math.inf, 3, 80),
    }
    if profile is not None:
        if profile not in profiles:
            raise ValueError(f"unknown profile {profile!r}: choose from {', '.join(profiles)}")
        _options.precision, _options.threshold, _options.edgeitems, _options.linewidth = profiles[
            profile
        ]
    for name, value in (
        ("precision", precision),
        ("threshold", threshold),
        ("edgeitems", edgeitems),
        ("linewidth", linewidth),
    ):
        if value is not None:
            setattr(_options, name, value)
    _options.sci_mode = sci_mode


class _Formatter:
    """Chooses one width and notation for all shown numbers, by those that are finite and not 0."""

    def __init__(self, values: list[Any], floating: bool) -> None:
        self.floating = floating
        self.int_mode = True
        self.sci = False
        self.width = 1
        if floating:
            values = [v for v in values if math.isfinite(v) and v != 0]
            if not values:
                return
            self.int_mode = all(v == math.ceil(v) for v in values)
            low, high = min(map(abs, values)), max(map(abs, values))
            self.sci = high / low > 1000.0 or high > 1.0e8 or not self.int_mode and low < 1.0e-4
            if _options.sci_mode is not None:
                self.sci = _options.sci_mode
        self.width = max([1, *(len(self._text(v)) for v in values)])

    def _text(self, value: Any) -> str:
        if not self.floating:
            return str(value)
        if self.sci:
            return f"{value:.{_options.precision}e}"
        if self.int_mode:
            text = f"{value:.0f}"
            return text if not math.isfinite(value) else text + "."
        return f"{value:.{_options.precision}f}"

    def format(self, value: Any) -> str:
        return self._text(value).rjust(self.width)


def _shown(tensor: Any) -> list[Any]:
    """The elements that will appear, flat."""
    summarize = tensor.numel() > _options.threshold
    edge = _options.edgeitems

    def walk(t: Any) -> list[Any]:
        if t.dim() == 0:
            return [t.item()]
        n = t.shape[0]
        picks = [*range(edge), *range(n - edge, n)] if summarize and n > 2 * edge else range(n)
        if t.dim() == 1:
            values = (
                t.tolist() if len(picks) == n else [*t[:edge].tolist(), *t[n - edge :].tolist()]
            )
            return values
        return [v for i in picks for v in walk(t[i])]

    return walk(tensor) if tensor.numel() else []


def _body(tensor: Any, indent: int, formatter: _Formatter, summarize: bool) -> str:
    edge = _options.edgeitems
    if tensor.dim() == 0:
        return (
            formatter.format(tensor.item()).strip()
            if not formatter.floating
            else formatter.format(tensor.item())
        )
    n = tensor.shape[0]
    cut = summarize and n > 2 * edge
    if tensor.dim() == 1:
        per_line = max(1, (_options.linewidth - indent) // (formatter.width + 2))
        if cut:
            items = [formatter.format(v) for v in tensor[:edge].tolist()]
            items.append(" ...")
            items += [formatter.format(v) for v in tensor[n - edge :].tolist()]
        else:
            items = [formatter.format(v) for v in tensor.tolist()]
        lines = [", ".join(items[i : i + per_line]) for i in range(0, len(items), per_line)]
        return "[" + (",\n" + " " * (indent + 1)).join(lines) + "]"
    if cut:
        parts = [_body(tensor[i], indent + 1, formatter, summarize) for i in range(edge)]
        parts.append("...")
        parts += [_body(tensor[i], indent + 1, formatter, summarize) for i in range(n - edge, n)]
    else:
        parts = [_body(tensor[i], indent + 1, formatter, summarize) for i in range(n)]
    return "[" + ("," + "\n" * (tensor.dim() - 1) + " " * (indent + 1)).join(parts) + "]"


def tensor_str(tensor: Any, contents: str | None = None) -> str:
    """`tensor([...], device=, dtype=, grad_fn=)` as torch prints it."""
    prefix = "tensor("
    suffixes = []
    if tensor.is_cuda:
        suffixes.append(f"device='{tensor.device}'")
    default = tensor.dtype in (_C.get_default_dtype(), _C.int64, _C.bool)
    data = tensor.detach()
    if data.is_cuda:
        data = data.cpu()
    if tensor.numel() == 0:
        body = "[]"
        if tensor.dim() != 1:
            suffixes.append(f"size={tuple(tensor.shape)}")
        if tensor.dtype is not _C.get_default_dtype():
            suffixes.append(f"dtype={tensor.dtype}")
    else:
        if not default:
            suffixes.append(f"dtype={tensor.dtype}")
        if contents is not None:
            body = contents
        else:
            formatter = _Formatter(_shown(data), data.is_floating_point())
            body = _body(data, len(prefix), formatter, data.numel() > _options.threshold)
    if tensor.grad_fn is not None:
        suffixes.append(f"grad_fn=<{tensor.grad_fn.name()}>")
    elif tensor.requires_grad:
        suffixes.append("requires_grad=True")
    out = prefix + body
    line = len(out) - out.rfind("\n") + 1  # torch leaves these two columns free
    for suffix in suffixes:
        if line + len(suffix) + 2 > _options.linewidth:
            out += ",\n" + " " * len(prefix) + suffix
            line = len(prefix) + len(suffix)
        else:
            out += ", " + suffix
            line += len(suffix) + 2
    return out + ")"


def named_tuple_str(result: Any) -> str:
    """How the named tuples that ops return print: a field a line."""
    lines = [f"{name}={value!r}" for name, value in zip(type(result).__match_args__, result)]
    return f"torch.return_types.{type(result).__name__}(\n" + ",\n".join(lines) + ")"
