"""How hooks get onto a module. `hooks.py` calls them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from vibetensor.torch.utils.hooks import RemovableHandle


class HookRegistration:
    """The part of Module that registers hooks; every method returns a removable handle."""

    _hooked: bool
    _forward_hooks: OrderedDict[int, Callable[..., Any]]
    _forward_hooks_with_kwargs: OrderedDict[int, bool]
    _forward_hooks_always_called: OrderedDict[int, bool]
    _forward_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _forward_pre_hooks_with_kwargs: OrderedDict[int, bool]
    _backward_hooks: OrderedDict[int, Callable[..., Any]]
    _backward_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _state_dict_hooks: OrderedDict[int, Callable[..., Any]]
    _state_dict_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _load_state_dict_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _load_state_dict_post_hooks: OrderedDict[int, Callable[..., Any]]

    def _add_call_hook(
        self,
        hooks: OrderedDict[int, Callable[..., Any]],
        hook: Callable[..., Any],
        prepend: bool,
        **marks: bool,
    ) -> RemovableHandle:
        """Adds a hook that __call__ runs; `marks` are the side tables that get its key if true."""
        tables = {name: getattr(self, name) for name in marks}
        handle = RemovableHandle(hooks, extra_dict=list(tables.values()))
        hooks[handle.id] = hook
        for name, table in tables.items():
            if marks[name]:
                table[handle.id] = True
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        # From now on __call__ looks at the hook tables; removing the hook does not undo this.
        self._hooked = True
        return handle

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Calls ``hook(module, args)`` before forward; it may return new arguments.

        With ``with_kwargs`` it is ``hook(module, args, kwargs)``, which may return
        ``(new_args, new_kwargs)``. ``prepend`` puts it before the hooks already there.
        """
        return self._add_call_hook(
            self._forward_pre_hooks, hook, prepend, _forward_pre_hooks_with_kwargs=with_kwargs
        )

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Calls ``hook(module, args, output)`` after forward; it may return another output.

        With ``with_kwargs`` it is ``hook(module, args, kwargs, output)``. With ``always_call`` it
        is called, with output None, even when forward raised.
        """
        return self._add_call_hook(
            self._forward_hooks,
            hook,
            prepend,
            _forward_hooks_with_kwargs=with_kwargs,
            _forward_hooks_always_called=always_call,
        )

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Calls ``hook(module, grad_output)`` when the gradients of the outputs are known; it may
        return others, as a tuple."""
        return self._add_call_hook(self._backward_pre_hooks, hook, prepend)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Calls ``hook(module, grad_input, grad_output)`` when the gradients of the positional
        inputs are known; it may return others for ``grad_input``, as a tuple."""
        return self._add_call_hook(self._backward_hooks, hook, prepend)

    def register_backward_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """The same as register_full_backward_hook (torch's older form is not kept)."""
        return self.register_full_backward_hook(hook)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Calls ``hook(module, prefix, keep_vars)`` before state_dict() reads this module."""
        return _add(self._state_dict_pre_hooks, hook)

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Calls ``hook(module, state_dict, prefix, local_metadata)`` after state_dict() read this
        module and its children; it changes the dictionary in place."""

        def in_place(module: Any, state: Any, prefix: str, metadata: Any) -> None:
            if hook(module, state, prefix, metadata) is not None:
                raise RuntimeError("state_dict post-hook must return None")

        return _add(self._state_dict_hooks, in_place)

    def _register_state_dict_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """As the public one, but what the hook returns (if not None) replaces the dictionary."""
        return _add(self._state_dict_hooks, hook)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Calls ``hook(module, state_dict, prefix, local_metadata, strict, missing_keys,
        unexpected_keys, error_msgs)`` before this module is loaded."""
        return self._register_load_state_dict_pre_hook(hook, with_module=True)

    def _register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], with_module: bool = False
    ) -> RemovableHandle:
        """The older form: without ``with_module`` the hook does not get the module."""

        def call(module: Any, *args: Any) -> None:
            hook(module, *args) if with_module else hook(*args)

        return _add(self._load_state_dict_pre_hooks, call)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Calls ``hook(module, incompatible_keys)`` after this module and its children are loaded;
        it may change the missing and unexpected keys in place."""
        return _add(self._load_state_dict_post_hooks, hook)


def _add(hooks: OrderedDict[int, Callable[..., Any]], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
