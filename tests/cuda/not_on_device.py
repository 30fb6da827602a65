"""Tests of the suites that `--device` moves which cannot run on a CUDA device, each with the reason.

Keys are test ids below `tests/`, with `*` for any text. The list is checked on every run: a pattern
that matches no test is an error.
"""

_INDEX = "an index in device memory that is out of range stops the kernel (docs/differences.md)"
_WEIGHTS = "bad probabilities in device memory stop the kernel (docs/differences.md)"
_ZERO = "an integer divided by zero is 0 on a device (docs/differences.md)"
_FORK = "forked workers cannot use the device; their datasets live on the CPU"
_EXCHANGE = "PyTorch's tensors are on the CPU here; tests/cuda/test_exchange.py has the device's"
_REPR = "the text names the device, which the reference on the CPU does not"
_SHARED = "memory shared with NumPy is the host's"

NOT_ON_DEVICE: dict[str, str] = {
    "core/test_errors.py::test_message[<lambda>-OutOfMemoryError-tried to allocate]": (
        "the device's message is tested in tests/cuda/test_failures.py"
    ),
    "core/test_errors.py::test_message[<lambda>-RuntimeError-no CUDA device can be used: .*]": (
        "there is a CUDA device"
    ),
    "core/test_errors.py::test_message[<lambda>-RuntimeError-ZeroDivisionError]": _ZERO,
    "core/test_limits.py::test_absurd_request[<lambda>-IndexError-out of bounds1]": _INDEX,
    "data/test_workers.py::*": _FORK,
    "ops/test_indexing.py::test_out_of_bounds_is_an_index_error*": _INDEX,
    "ops/test_against_op_db.py::test_operator[multinomial-errors]": _WEIGHTS,
    "io/test_exchange.py::test_*": _SHARED,
    "io/test_exchange_with_frameworks.py::test_*": _EXCHANGE,
    "nn/test_layers_against_torch.py::test_parameter_containers_repr": _REPR,
    "nn/test_layers_against_torch.py::test_parameter_repr": _REPR,
}
