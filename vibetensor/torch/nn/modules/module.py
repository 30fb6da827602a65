"""Module: a tree of parameters, buffers and submodules with a forward."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import vibetensor.torch as torch
from vibetensor._C import Tensor
from vibetensor.torch.nn.modules.hooks import (
    any_global,
    call_with_hooks,
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from vibetensor.torch.nn.modules.state_dict import ModuleState
from vibetensor.torch.nn.parameter import Buffer, Parameter
from vibetensor.torch.utils.registry import HookTable, Registry, note_change

__all__ = [
    "Module",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
]

REGISTRIES = ("_parameters", "_buffers", "_modules")
# Run by calls of the module; the others mark some of these, or concern its state dict.
CALL_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OTHER_HOOK_TABLES = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_MISSING = object()


class Module(ModuleState):
    """Base of all layers: subclass it, make submodules in ``__init__`` and define ``forward``.

    Assigning a Parameter, Buffer or Module as an attribute registers it. Calling the module runs
    ``forward`` and the hooks around it.
    """

    training: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            given = (
                f"{len(args)} positional arguments" if args else f"keyword '{next(iter(kwargs))}'"
            )
            raise TypeError(
                f"{type(self).__name__}.__init__() takes no arguments here, got {given}"
            )
        # Straight into the dictionary: __setattr__ has to classify every value.
        fields = self.__dict__
        fields["training"] = True
        fields["_hooked"] = False
        fields["_parameters"] = Registry()
        fields["_buffers"] = Registry()
        fields["_modules"] = Registry()
        fields["_non_persistent_buffers_set"] = set()
        for table in CALL_HOOK_TABLES:
            fields[table] = HookTable()
        for table in _OTHER_HOOK_TABLES:
            fields[table] = OrderedDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the output; every subclass defines it."""
        raise NotImplementedError(
            f'Module [{type(self).__name__}] is missing the required "forward" function'
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._hooked or any_global:
            return call_with_hooks(self, args, kwargs)
        return self.forward(*args, **kwargs)

    # --- attributes

    def __getattr__(self, name: str) -> Any:
        # Reached only when the normal lookup failed. Before __init__ there are no registries.
        fields = self.__dict__
        if "_modules" in fields:
            found = fields["_modules"]
            if name in found:
                return found[name]
            found = fields["_parameters"]
            if name in found:
                return found[name]
            found = fields["_buffers"]
            if name in found:
                return found[name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.__dict__
        parameters = fields.get("_parameters")
        if parameters is None:
            if isinstance(value, (Parameter, Module, Buffer)):
                kind = "module" if isinstance(value, Module) else type(value).__name__.lower()
                raise AttributeError(f"cannot assign {kind}s before Module.__init__() call")
            object.__setattr__(self, name, value)
        elif isinstance(value, Parameter):
            self._forget(name, keep="_parameters")
            self.register_parameter(name, value)
        elif isinstance(value, Module):
            self._forget(name, keep="_modules")
            fields["_modules"][name] = value
        elif name in parameters:
            if value is not None:
                raise TypeError(
                    f"cannot assign '{_type_name(value)}' as parameter '{name}' "
                    "(torch.nn.Parameter or None expected)"
                )
            parameters[name] = None
        elif name in fields["_modules"]:
            if value is not None:
                raise TypeError(
                    f"cannot assign '{_type_name(value)}' as child module '{name}' "
                    "(torch.nn.Module or None expected)"
                )
            fields["_modules"][name] = None
        elif isinstance(value, Buffer):
            # Before the test of the name: a new Buffer brings a `persistent` of its own.
            self._forget(name, keep="_buffers")
            self.register_buffer(name, value, value.persistent)
        elif name in fields["_buffers"]:
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(
                    f"cannot assign '{_type_name(value)}' as buffer '{name}' "
                    "(torch.nn.Buffer, torch.Tensor or None expected)"
                )
            fields["_buffers"][name] = value
        else:
            same = fields.get(name, _MISSING) is value
            object.__setattr__(self, name, value)
            if not same:
                note_change()

    def _forget(self, name: str, keep: str) -> None:
        """Takes a name out of wherever it was, so that it can be registered in `keep`."""
        fields = self.__dict__
        fields.pop(name, None)
        for registry in REGISTRIES:
            if registry != keep and name in fields[registry]:
                del fields[registry][name]
        if keep != "_buffers":
            fields["_non_persistent_buffers_set"].discard(name)

    def __delattr__(self, name: str) -> None:
        for registry in (self._parameters, self._modules, self._buffers):
            if name in registry:
                del registry[name]
                self._non_persistent_buffers_set.discard(name)
                return
        object.__delattr__(self, name)
        note_change()

    def __dir__(self) -> list[str]:
        names = {*dir(type(self)), *self.__dict__}
        names.update(self._parameters, self._modules, self._buffers)
        return sorted(name for name in names if name.isidentifier())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copies and pickles take: not a capture of `forward`, which is one of this object's
        tensors, but the forward that it was made of."""
        reduced = super().__reduce_ex__(protocol)
        forward = self.__dict__.get("forward")
        plain = getattr(forward, "captured_forward", None)
        if plain is None or not isinstance(reduced, tuple) or len(reduced) < 3:
            return reduced
        state = reduced[2]
        fields, *slots = state if isinstance(state, tuple) else (state,)
        if not isinstance(fields, dict) or fields.get("forward") is not forward:
            return reduced  # a __getstate__ of its own
        fields = {name: value for name, value in fields.items() if name != "forward"}
        if getattr(plain, "__func__", None) is not type(self).forward:
            fields["forward"] = plain
        return (*reduced[:2], (fields, *slots) if slots else fields, *reduced[3:])

    def __setstate__(self, state: Any) -> None:
        fields = self.__dict__
        state, slots = state if isinstance(state, tuple) else (state, {})
        fields.update(state)
        for name, value in slots.items():  # of a subclass with __slots__
            object.__setattr__(self, name, value)
        for registry in REGISTRIES:
            if type(fields.get(registry)) is dict:
                fields[registry] = Registry(fields[registry])
        for table in CALL_HOOK_TABLES:
            fields.setdefault(table, HookTable())
        for table in _OTHER_HOOK_TABLES:
            fields.setdefault(table, OrderedDict())
        fields.setdefault("_non_persistent_buffers_set", set())
        fields.setdefault("_hooked", False)
        note_change()

    # --- registration

    def _check_name(self, name: str, kind: str, registry: dict[str, Any]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string. Got {_type_name(name)}")
        if "." in name:
            detail = f", got: {name}" if kind == "module" else ""
            raise KeyError(f'{kind} name can\'t contain "."{detail}')
        if name == "":
            raise KeyError(f'{kind} name can\'t be empty string ""')
        if name not in registry and hasattr(self, name):
            raise KeyError(f"attribute '{name}' already exists")

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Adds a parameter; None reserves the name. Raises KeyError for a name that is taken and
        ValueError for a tensor that has history."""
        if "_parameters" not in self.__dict__:
            raise AttributeError("cannot assign parameter before Module.__init__() call")
        self._check_name(name, "parameter", self._parameters)
        if param is not None:
            if not isinstance(param, Parameter):
                raise TypeError(
                    f"cannot assign '{_type_name(param)}' object to parameter '{name}' "
                    "(torch.nn.Parameter or None required)"
                )
            if param.grad_fn is not None:
                raise ValueError(
                    f"Cannot assign non-leaf Tensor to parameter '{name}'. Model parameters must "
                    "be created explicitly. To express it as a function of another Tensor, compute "
                    "the value in the forward() method."
                )
        self._parameters[name] = param

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Adds a tensor that is state but not learned; a persistent one is in state_dict()."""
        if "_buffers" not in self.__dict__:
            raise AttributeError("cannot assign buffer before Module.__init__() call")
        self._check_name(name, "buffer", self._buffers)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(
                f"cannot assign '{_type_name(tensor)}' object to buffer '{name}' "
                "(torch Tensor or None required)"
            )
        self._buffers[name] = tensor
        if persistent:
            self._non_persistent_buffers_set.discard(name)
        else:
            self._non_persistent_buffers_set.add(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Adds a child; None reserves the name. Raises KeyError for a name that is taken."""
        if module is not None and not isinstance(module, Module):
            raise TypeError(f"{_type_name(module)} is not a Module subclass")
        self._check_name(name, "module", self._modules)
        self._modules[name] = module

    def register_module(self, name: str, module: Module | None) -> None:
        """The same as add_module."""
        self.add_module(name, module)

    # --- lookup by dotted name

    def get_submodule(self, target: str) -> Module:
        """The module at a dotted path ("" is this one). Raises AttributeError if there is none."""
        module: Any = self
        for part in target.split(".") if target else ():
            if not hasattr(module, part):
                raise AttributeError(f"{type(module).__name__} has no attribute `{part}`")
            module = getattr(module, part)
            if not isinstance(module, Module):
                raise AttributeError(f"`{part}` is not an nn.Module")
        return module

    def set_submodule(self, target: str, module: Module, strict: bool = False) -> None:
        """Puts a module at a dotted path; with ``strict`` one must already be there."""
        if not target:
            raise ValueError("Cannot set the submodule without a target name!")
        parent_path, _, name = target.rpartition(".")
        parent = self.get_submodule(parent_path)
        if strict and not isinstance(getattr(parent, name, None), Module):
            raise AttributeError(f"{type(parent).__name__} has no submodule `{name}`")
        if not isinstance(module, Module):
            raise ValueError(f"`module` is not an nn.Module, found {type(module)}")
        setattr(parent, name, module)

    def get_parameter(self, target: str) -> Parameter:
        """The parameter at a dotted path. Raises AttributeError if there is none."""
        parameter = self._get_at(target)
        if not isinstance(parameter, Parameter):
            raise AttributeError(f"`{target.rpartition('.')[2]}` is not an nn.Parameter")
        return parameter

    def get_buffer(self, target: str) -> Tensor:
        """The buffer at a dotted path. Raises AttributeError if there is none."""
        path, _, name = target.rpartition(".")
        self._get_at(target)
        module = self.get_submodule(path)
        if name not in module._buffers:
            raise AttributeError(f"`{name}` is not a buffer")
        return module._buffers[name]  # type: ignore[return-value]

    def _get_at(self, target: str) -> Any:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if not hasattr(module, name):
            raise AttributeError(f"{type(module).__name__} has no attribute `{name}`")
        return getattr(module, name)

    # --- traversal

    def named_modules(
        self, memo: set[Any] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of this module and all below it, parents first."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                below = f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, below, remove_duplicate)

    def _named_members(
        self,
        get_members_fn: Callable[[Module], Any],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Any]]:
        """Members that are not None, each tensor once if `remove_duplicate`."""
        seen: set[int] = set()
        modules = (
            self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
            if recurse
            else [(prefix, self)]
        )
        for path, module in modules:
            for name, member in get_members_fn(module):
                if member is None or id(member) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(member))
                yield (f"{path}.{name}" if path else name), member

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter); a shared one comes once unless ``remove_duplicate=False``."""
        return self._named_members(
            lambda module: module._parameters.items(), prefix, recurse, remove_duplicate
        )

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, buffer), persistent or not."""
        return self._named_members(
            lambda module: module._buffers.items(), prefix, recurse, remove_duplicate
        )

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Every parameter once, in order of registration."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Every buffer once."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        for _, module in self.named_modules():
            yield module

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct children, each once."""
        seen = set()
        for name, module in self._modules.items():
            if module is not None and module not in seen:
                seen.add(module)
                yield name, module

    def children(self) -> Iterator[Module]:
        """The direct children, each once."""
        for _, module in self.named_children():
            yield module

    def apply(self, fn: Callable[[Module], None]) -> Any:
        """Calls ``fn`` on every module below and then on this one; returns self."""
        for module in self.children():
            module.apply(fn)
        fn(self)
        return self

    # --- conversion

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Replaces the memory of every parameter, gradient and buffer by ``fn`` of it.

        Parameters stay the same objects, so optimizers and tied weights keep their hold.
        """
        if recurse:
            for module in self.children():
                module._apply(fn)
        for parameter in self._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    moved = fn(parameter)
                    grad = None if parameter.grad is None else fn(parameter.grad)
                # The gradient must match the parameter at every moment.
                parameter.grad = None
                parameter.data = moved
                if grad is not None:
                    parameter.grad = grad.requires_grad_(False)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moves to a device and/or converts floating tensors to a floating dtype, in place.

        Forms: to(device), to(dtype), to(device, dtype), to(tensor), with non_blocking and
        memory_format (which applies to 4-d tensors). Returns self. Raises TypeError for a dtype
        that is not floating.
        """
        from vibetensor.torch._tensor import _parse_to

        device, dtype, non_blocking, _, memory_format = _parse_to(args, dict(kwargs))
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(
                f"nn.Module.to only accepts floating point dtypes, but got desired dtype={dtype}"
            )

        def convert(tensor: Tensor) -> Tensor:
            wanted = dtype if tensor.is_floating_point() else None
            moved = tensor.to(device or tensor.device, wanted or tensor.dtype, non_blocking)
            if memory_format is not None and moved.dim() == 4:
                moved = moved.contiguous(memory_format=memory_format)
            return moved

        return self._apply(convert)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Any:
        """Moves to a device without copying: the values are uninitialised."""
        return self._apply(lambda t: torch.empty_like(t, device=device), recurse=recurse)

    def cpu(self) -> Any:
        """Moves to CPU memory, in place."""
        return self._apply(lambda t: t.cpu())

    def cuda(self, device: Any = None) -> Any:
        """Moves to a CUDA device, in place."""
        return self._apply(lambda t: t.cuda(device))

    def type(self, dst_type: Any) -> Any:
        """Converts every parameter and buffer to a dtype, in place."""
        return self._apply(lambda t: t.type(dst_type))

    def float(self) -> Any:
        """Converts floating tensors to float32, in place."""
        return self._apply(lambda t: t.float() if t.is_floating_point() else t)

    def double(self) -> Any:
        """Converts floating tensors to float64, in place."""
        return self._apply(lambda t: t.double() if t.is_floating_point() else t)

    def half(self) -> Any:
        """Converts floating tensors to float16, in place."""
        return self._apply(lambda t: t.half() if t.is_floating_point() else t)

    def bfloat16(self) -> Any:
        """Converts floating tensors to bfloat16, in place."""
        return self._apply(lambda t: t.bfloat16() if t.is_floating_point() else t)

    def share_memory(self) -> Any:
        """Tensor.share_memory_ on every parameter and buffer."""
        return self._apply(lambda t: t.share_memory_())

    # --- modes

    def train(self, mode: bool = True) -> Any:
        """Sets ``training`` here and below (dropout and batch norm look at it); returns self."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.training = mode
        for module in self.children():
            module.train(mode)
        return self

    def eval(self) -> Any:
        """train(False)."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Sets requires_grad of every parameter; returns self."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops every parameter's gradient, or zeroes it in place."""
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            if set_to_none:
                parameter.grad = None
            else:
                if parameter.grad.grad_fn is not None:
                    parameter.grad.detach_()
                else:
                    parameter.grad.requires_grad_(False)
                parameter.grad.zero_()

    def compile(self, **options: Any) -> None:
        """Has this module's forward captured and replayed, in place; see ``torch.compile``.

        Names of parameters stay. Copies and pickles of the module are not compiled.
        """
        from vibetensor.torch.session import compile as compile_function

        forward = type(self).forward.__get__(self)
        object.__setattr__(self, "forward", compile_function(forward, **options))

    # --- printing

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """What stands in the parentheses of repr before the children; override it."""
        return ""

    def __repr__(self) -> str:
        extra = self.extra_repr()
        lines = extra.split("\n") if extra else []
        children = [
            f"({name}): {_indented(repr(module))}" for name, module in self._modules.items()
        ]
        if len(lines) == 1 and not children:
            return f"{self._get_name()}({lines[0]})"
        if not lines and not children:
            return f"{self._get_name()}()"
        body = "".join(f"\n  {line}" for line in lines + children)
        return f"{self._get_name()}({body}\n)"


def _indented(text: str) -> str:
    """`text` with every line but the first moved two columns to the right."""
    return text.replace("\n", "\n  ")


def _type_name(value: Any) -> str:
    """The type as torch names it in errors: 'torch.FloatTensor', 'int', 'mypackage.Thing'."""
    if isinstance(value, Tensor):
        return value.type()
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


# What is called before an attribute of a module is read, and before `training` is set.
_Observers: TypeAlias = tuple[Callable[["Module", str], None], Callable[["Module"], None]]
_observers: tuple[_Observers, ...] = ()
_observing = threading.Lock()
_set_attribute = Module.__setattr__


# What every module has; only `training`, `forward` and what is registered may be a module's own.
_INNER = frozenset({*dir(Module), *vars(Module())} - {"training", "forward", *REGISTRIES})


def _observed_read(module: Module, name: str) -> Any:
    if name not in _INNER:
        for read, _ in _observers:
            read(module, name)
    return object.__getattribute__(module, name)


def _observed_write(module: Module, name: str, value: Any) -> None:
    if name == "training":
        for _, mode in _observers:
            mode(module)
    _set_attribute(module, name, value)


@contextlib.contextmanager
def observed_attributes(
    read: Callable[[Module, str], None], mode: Callable[[Module], None]
) -> Iterator[None]:
    """Meanwhile calls ``read(module, name)`` before an attribute of any module is read, except what
    the base class has for itself, and ``mode(module)`` before ``training`` is set, by ``train`` and
    ``eval`` too. All of these are slow then; before and after they cost nothing."""
    global _observers
    mine = (read, mode)
    with _observing:
        _observers = (*_observers, mine)
        Module.__getattribute__ = _observed_read  # type: ignore[method-assign]
        Module.__setattr__ = _observed_write  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _observing:
            _observers = tuple(each for each in _observers if each is not mine)
            if not _observers:
                del Module.__getattribute__
                Module.__setattr__ = _set_attribute  # type: ignore[method-assign]
