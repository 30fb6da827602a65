"""Numerical checks of gradients by central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vibetensor import _C


class GradcheckError(RuntimeError):
    """Analytical and numerical gradients differ; the message shows both."""


def _tensors(value: Any) -> list[_C.Tensor]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in items if isinstance(v, _C.Tensor)]


def _differentiable(value: Any) -> list[_C.Tensor]:
    return [t for t in _tensors(value) if t.is_floating_point() and t.requires_grad]


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    fast_mode: bool = False,
    **ignored: Any,
) -> bool:
    """True if the gradients of `func(*inputs)` agree with central differences of step `eps`.

    Inputs that require grad should be float64. Every element of every output is checked against
    every element of every input (`fast_mode` checks a random combination of them instead).
    Raises GradcheckError on a mismatch, or returns False with `raise_exception=False`.
    """
    del check_undefined_grad, ignored
    try:
        _check(func, inputs, eps, atol, rtol, nondet_tol, fast_mode)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def _check(
    func: Any, inputs: Any, eps: float, atol: float, rtol: float, nondet_tol: float, fast: bool
) -> None:
    from vibetensor.torch import autograd

    args = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    targets = [t for t in args if isinstance(t, _C.Tensor) and t.requires_grad]
    if not targets:
        raise ValueError(
            "gradcheck expects at least one input tensor to require gradient, but none of them have requires_grad=True."
        )
    outputs = _differentiable(func(*args))
    if not outputs:
        raise GradcheckError("gradcheck: no output requires grad")
    for number, output in enumerate(outputs):
        directions = _directions(output, fast)
        for direction in directions:
            analytical = autograd.grad(
                output, targets, direction, retain_graph=True, allow_unused=True
            )
            again = autograd.grad(output, targets, direction, retain_graph=True, allow_unused=True)
            for index, target in enumerate(targets):
                exact = analytical[index]
                exact = _C._ops.zeros_like(target) if exact is None else exact
                repeat = _C._ops.zeros_like(target) if again[index] is None else again[index]
                if float((exact - repeat).abs().sum()) > nondet_tol:
                    raise GradcheckError(
                        f"Backward is not reentrant: gradient of output {number} for input {index} varies between runs"
                    )
                numerical = _numerical(func, args, target, number, direction, eps)
                difference = (exact.detach().double() - numerical).abs()
                bound = atol + rtol * numerical.abs()
                if bool((difference > bound).any()) or bool(difference.isnan().any()):
                    raise GradcheckError(
                        f"Jacobian mismatch for output {number} with respect to input {index},\n"
                        f"numerical:{numerical}\nanalytical:{exact}\n"
                    )


def _directions(output: _C.Tensor, fast: bool) -> list[_C.Tensor]:
    if fast:
        return [_C._ops.randn_like(output.detach())]
    out = []
    for i in range(output.numel()):
        direction = _C._ops.zeros(output.numel(), dtype=output.dtype, device=output.device)
        direction[i] = 1
        out.append(direction.reshape(output.shape))
    return out


def _numerical(
    func: Any, args: Any, target: _C.Tensor, number: int, direction: _C.Tensor, eps: float
) -> _C.Tensor:
    """Central differences of <output, direction> for every element of `target`, perturbed in place."""
    result = _C._ops.zeros(tuple(target.shape), dtype=_C.float64, device=target.device)
    data = target.data
    for index in _indices(tuple(target.shape)):
        value = data[index].item()
        sides = []
        for step in (eps, -eps):
            data[index] = value + step
            output = _differentiable_by_position(func(*args), number)
            sides.append(float((output.detach().double() * direction.double()).sum()))
        data[index] = value
        result[index] = (sides[0] - sides[1]) / (2 * eps)
    return result


def _differentiable_by_position(value: Any, number: int) -> _C.Tensor:
    return _differentiable(value)[number]


def _indices(shape: tuple[int, ...]) -> Any:
    import itertools

    return itertools.product(*(range(n) for n in shape))


def gradgradcheck(
    func: Callable[..., Any],
    inputs: Any,
    grad_outputs: Any = None,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    gen_non_contig_grad_outputs: bool = False,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    fast_mode: bool = False,
    **ignored: Any,
) -> bool:
    """gradcheck of the function that maps (inputs, grad_outputs) to gradients: second derivatives."""
    from vibetensor.torch import autograd

    del gen_non_contig_grad_outputs, ignored
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    outputs = _differentiable(func(*args))
    if grad_outputs is None:
        given = tuple(_C._ops.randn_like(o.detach()).requires_grad_() for o in outputs)
    else:
        given = tuple(grad_outputs) if isinstance(grad_outputs, (tuple, list)) else (grad_outputs,)

    def gradient(*values: Any) -> Any:
        forward, grads = values[: len(args)], values[len(args) :]
        targets = [t for t in forward if isinstance(t, _C.Tensor) and t.requires_grad]
        found = autograd.grad(
            _differentiable(func(*forward)), targets, grads, create_graph=True, allow_unused=True
        )
        return tuple(g for g in found if g is not None and g.requires_grad)

    return gradcheck(
        gradient,
        (*args, *given),
        eps=eps,
        atol=atol,
        rtol=rtol,
        raise_exception=raise_exception,
        nondet_tol=nondet_tol,
        check_undefined_grad=check_undefined_grad,
        fast_mode=fast_mode,
    )
