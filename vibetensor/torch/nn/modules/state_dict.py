"""Module.state_dict and load_state_dict: torch's format, protocol and error texts."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping
from typing import Any

import vibetensor.torch as torch
from vibetensor._C import Tensor
from vibetensor.torch.nn.modules.hook_registration import HookRegistration
from vibetensor.torch.nn.parameter import Parameter

_EXTRA_STATE = "_extra_state"


class _IncompatibleKeys(namedtuple("_IncompatibleKeys", ["missing_keys", "unexpected_keys"])):
    """What load_state_dict returns: the keys without a counterpart, on either side."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return super().__repr__()

    __str__ = __repr__


class ModuleState(HookRegistration):
    """The part of Module that reads and writes its state.

    A state dict is an OrderedDict from dotted names to tensors, with an attribute ``_metadata``
    from module prefixes to ``{"version": …}``.
    """

    _version: int = 1
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]
    _modules: dict[str, Any]
    _non_persistent_buffers_set: set[str]

    def get_extra_state(self) -> Any:
        """Override it (and set_extra_state) to put something besides tensors into state_dict()."""
        raise RuntimeError(
            "Reached a code path in Module.get_extra_state() that should never be called."
        )

    def set_extra_state(self, state: Any) -> None:
        """Receives what get_extra_state gave."""
        raise RuntimeError(
            "Reached a code path in Module.set_extra_state() that should never be called."
        )

    def _has_extra_state(self) -> bool:
        return type(self).get_extra_state is not ModuleState.get_extra_state

    def _persistent(self) -> Iterator[tuple[str, Tensor]]:
        """Own parameters and persistent buffers that are not None."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield name, parameter
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._non_persistent_buffers_set:
                yield name, buffer

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Writes this module's own state; override it to save in another form."""
        for name, tensor in self._persistent():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        if self._has_extra_state():
            destination[prefix + _EXTRA_STATE] = self.get_extra_state()

    def state_dict(
        self,
        *args: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> Any:
        """Parameters and persistent buffers of this module and all below it, by dotted name.

        The tensors share the module's memory; they are detached unless ``keep_vars``. Shared
        (tied) parameters appear under each of their names.
        """
        if args:
            warnings.warn(
                "state_dict: positional arguments are deprecated, name them: destination=, "
                "prefix=, keep_vars=.",
                FutureWarning,
                stacklevel=2,
            )
        for name, value in zip(("destination", "prefix", "keep_vars"), args):
            if name == "destination":
                destination = value if destination is None else destination
            elif name == "prefix":
                prefix = prefix or value
            else:
                keep_vars = keep_vars or value
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()  # type: ignore[attr-defined]
        metadata: dict[str, Any] = {"version": self._version}
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = metadata
        for hook in list(self._state_dict_pre_hooks.values()):
            hook(self, prefix, keep_vars)
        self._save_to_state_dict(destination, prefix, keep_vars)
        for name, module in self._modules.items():
            if module is not None:
                module.state_dict(
                    destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
                )
        for hook in list(self._state_dict_hooks.values()):
            replacement = hook(self, destination, prefix, metadata)
            if replacement is not None:
                destination = replacement
        return destination

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads this module's own entries (names starting with ``prefix``), not the children's.

        Appends to the three lists instead of raising. ``local_metadata["assign_to_params_buffers"]``
        says whether entries replace the tensors instead of being copied into them.
        """
        for hook in list(self._load_state_dict_pre_hooks.values()):
            hook(
                self, state_dict, prefix, local_metadata,
                strict, missing_keys, unexpected_keys, error_msgs,
            )  # fmt: skip
        assign = local_metadata.get("assign_to_params_buffers", False)
        own = dict(self._persistent())
        for name, tensor in own.items():
            key = prefix + name
            if key in state_dict:
                problem = self._load_entry(name, key, tensor, state_dict[key], assign)
                if problem:
                    error_msgs.append(problem)
            elif strict:
                missing_keys.append(key)

        extra = prefix + _EXTRA_STATE
        if type(self).set_extra_state is not ModuleState.set_extra_state:
            if extra in state_dict:
                self.set_extra_state(state_dict[extra])
            elif strict:
                missing_keys.append(extra)
        elif strict and extra in state_dict:
            unexpected_keys.append(extra)

        if strict:
            for key in state_dict:
                if not key.startswith(prefix) or key == extra:
                    continue
                first, dot, _ = key[len(prefix) :].partition(".")
                if first not in self._modules if dot else first not in own:
                    unexpected_keys.append(key)

    def _load_entry(
        self, name: str, key: str, tensor: Tensor, value: Any, assign: bool
    ) -> str | None:
        """Loads one entry; returns what is wrong with it, or None."""
        if not isinstance(value, Tensor):
            return (
                f'While copying the parameter named "{key}", expected torch.Tensor or '
                f"Tensor-like object from checkpoint but received {type(value)}"
            )
        if tensor.dim() == 0 and tuple(value.shape) == (1,):
            # Scalars were once saved as tensors of one element.
            value = value[0]
        if value.shape != tensor.shape:
            return (
                f"size mismatch for {key}: copying a param with shape {value.shape} from "
                f"checkpoint, the shape in current model is {tensor.shape}."
            )
        try:
            with torch.no_grad():
                if not assign:
                    tensor.copy_(value)
                elif isinstance(tensor, Parameter) and not isinstance(value, Parameter):
                    setattr(self, name, Parameter(value, requires_grad=tensor.requires_grad))
                else:
                    setattr(self, name, value.requires_grad_(tensor.requires_grad))
        except Exception as error:
            return (
                f'While {"assigning" if assign else "copying"} the parameter named "{key}", '
                f"whose dimensions in the model are {tensor.shape} and "
                f"whose dimensions in the checkpoint are {value.shape}, "
                f"an exception occurred : {error.args}."
            )
        return None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Copies the entries of ``state_dict`` into the tensors of the same names.

        With ``assign`` the entries themselves become the parameters and buffers (keeping each
        parameter's requires_grad). Raises RuntimeError that lists every wrong shape and, if
        ``strict``, every missing and unexpected key. Raises TypeError if it is not a mapping.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        metadata = getattr(state_dict, "_metadata", None)
        # A copy, which pre-hooks may change.
        entries = OrderedDict(state_dict)
        if metadata is not None:
            entries._metadata = metadata  # type: ignore[attr-defined]

        def load(module: ModuleState, local: dict[str, Any], prefix: str = "") -> None:
            known = {} if metadata is None else metadata.get(prefix[:-1], {})
            if assign:
                known = {**known, "assign_to_params_buffers": True}
            module._load_from_state_dict(local, prefix, known, True, missing, unexpected, errors)
            for name, child in module._modules.items():
                if child is not None:
                    below = f"{prefix}{name}."
                    load(child, {k: v for k, v in local.items() if k.startswith(below)}, below)
            incompatible = _IncompatibleKeys(missing, unexpected)
            for hook in list(module._load_state_dict_post_hooks.values()):
                if hook(module, incompatible) is not None:
                    raise AssertionError(
                        "Hooks registered with ``register_load_state_dict_post_hook`` are not "
                        "expected to return new values, if incompatible_keys need to be modified, "
                        "it should be done inplace."
                    )

        load(self, entries)
        if strict:
            if unexpected:
                errors.insert(0, f"Unexpected key(s) in state_dict: {_quoted(unexpected)}. ")
            if missing:
                errors.insert(0, f"Missing key(s) in state_dict: {_quoted(missing)}. ")
        if errors:
            listed = "\n\t".join(errors)
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}:\n\t{listed}"
            )
        return _IncompatibleKeys(missing, unexpected)


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
