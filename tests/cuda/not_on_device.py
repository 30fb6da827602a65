"""Tests of the suites that `--device` moves which cannot run on a CUDA device, each with the reason.

Keys are test ids below `tests/`, with `*` for any text and `?` for any character. The list is checked on every run: a pattern
that matches no test is an error.
"""

_INDEX = "an index in device memory that is out of range stops the kernel (docs/differences.md)"
_WEIGHTS = "bad probabilities in device memory stop the kernel (docs/differences.md)"
_ZERO = "an integer divided by zero is 0 on a device (docs/differences.md)"
_FORK = "a forked process cannot use the device; DataLoader workers give tensors of the CPU"
_HOST_INDICES = "tensor_split reads its indices on the host, as in torch"
_INTEGERS = "a device has no integer kernel of it, as in torch"
_TYPE_NAME = "the message names the device's type, which the reference on the CPU does not"
_EXCHANGE = "PyTorch's tensors are on the CPU here; tests/cuda/test_exchange.py has the device's"
_REPR = "the text names the device, which the reference on the CPU does not"
_PRINTING = f"{_REPR}; tests/cuda/test_printing.py has the device's"
_FLOAT8 = "of NumPy's data on the CPU; tests/cuda/test_float8.py has the device's"
_REPORT = "reports name the device; the texts that are expected are those of the CPU"
_OF_THE_CPU = (
    "makes its tensors, or states what it expects, for the CPU; not made ready for devices yet"
)
_CPU_PASSES = (
    "states what the passes leave on the CPU; what those of CUDA do is in tests beside it, and all "
    "are judged by results in the random programs and training runs"
)
_CPU_MEMORY = "counts the CPU's memory; tests/cuda/test_graphs.py counts the device's"
_SHARED = "memory shared with NumPy is the host's"
_CPU_THREADS = "of the CPU's threads"

NOT_ON_DEVICE: dict[str, str] = {
    "autograd/test_inplace.py::test_writing_a_view_of_a_base*[vibetensor-as_numpy]": _SHARED,
    "core/test_errors.py::test_message[<lambda>-OutOfMemoryError-tried to allocate]": (
        "the device's message is tested in tests/cuda/test_failures.py"
    ),
    "core/test_errors.py::test_message[<lambda>-RuntimeError-no CUDA device can be used: .*]": (
        "there is a CUDA device"
    ),
    "core/test_errors.py::test_message[<lambda>-RuntimeError-ZeroDivisionError]": _ZERO,
    "core/test_limits.py::test_absurd_request[<lambda>-IndexError-out of bounds1]": _INDEX,
    "core/test_printing.py::test_floats*": _PRINTING,
    "core/test_printing.py::test_forms": _PRINTING,
    "core/test_printing.py::test_history*": _PRINTING,
    "core/test_printing.py::test_named_tuples": _PRINTING,
    "core/test_printing.py::test_shapes*": _PRINTING,
    "data/test_workers.py::*": _FORK,
    "graphs/test_capture.py::test_host_reads_are_refused_with_their_line[numpy-<lambda>]": (
        "the tests' numpy() copies through the CPU, and is the line that is named"
    ),
    "graphs/test_capture_edges.py::test_arrays_of_results_stay": _SHARED,
    "graphs/test_capture_edges.py::test_host_data_changed_in_place_is_refused": (
        "host data is copied to the device anew in each run, so it may be changed there"
    ),
    "graphs/test_capture_edges.py::test_memory_that_is_wrapped_twice": _SHARED,
    "graphs/test_held_gradients.py::test_an_error_in_a_replay_gives_the_bound_gradient_back[op]": _INDEX,
    "graphs/test_replay.py::test_errors_of_kernels_keep_their_class": _INDEX,
    "graphs/test_report_profile.py::test_an_op_that_raises_leaves_state_as_it_was": _INDEX,
    "graphs/test_fusions_epilogues.py::test_nothing_is_rewritten_on_the_cpu": _CPU_PASSES,
    "graphs/test_fusions_joined_casts.py::test_nothing_is_rewritten_on_the_cpu": _CPU_PASSES,
    "graphs/test_fusions_models.py::test_training_is_bit_for_bit*": _CPU_PASSES,
    "graphs/test_pass_chains.py::*": _OF_THE_CPU,
    "graphs/test_pass_constants.py::test_a_wrapped_array_is_no_constant": _SHARED,
    "graphs/test_pass_copies.py::test_pieces_of_pointwise_ops*": _CPU_PASSES,
    "graphs/test_pass_copies.py::test_pieces_that_stay": _CPU_PASSES,
    "graphs/test_pass_copies.py::test_many_at_once_and_one_of_another": _CPU_PASSES,
    "graphs/test_pass_copies.py::test_results_are_written_where_they_are_copied": _CPU_PASSES,
    "graphs/test_promises.py::test_a_replay_takes_no_memory": _CPU_MEMORY,
    "graphs/test_promises.py::test_a_replay_that_fails_says_why_and_the_next_one_works": _INDEX,
    "graphs/test_promises.py::test_an_error_that_the_function_swallows_is_not_lost": _INDEX,
    "graphs/test_report.py::*": _REPORT,
    "graphs/test_report_html.py::*": _REPORT,
    "graphs/test_train_benchmark.py::*": _OF_THE_CPU,
    "nn/test_module_against_torch.py::test_errors[a tensor for a parameter]": _TYPE_NAME,
    "optim/test_optimizers.py::test_errors_are_torchs[1]": _TYPE_NAME,
    "ops/test_fused.py::test_cross_entropy_gradient_checks_targets": _INDEX,
    "ops/test_indexing.py::test_indices_that_mean_nothing[index5]": _INDEX,
    "ops/test_indexing.py::test_out_of_bounds_is_an_index_error*": _INDEX,
    "ops/test_against_op_db.py::test_operator[gather-errors]": _INDEX,
    "ops/test_against_op_db.py::test_operator[multinomial-errors]": _WEIGHTS,
    "ops/test_against_op_db.py::test_operator[nn.functional.avg_pool?d-int64]": _INTEGERS,
    "ops/test_against_op_db.py::test_operator[nn.functional.avg_pool2d-out]": _INTEGERS,
    "ops/test_against_op_db.py::test_operator[nn.functional.conv?d-int64]": _INTEGERS,
    "ops/test_against_op_db.py::test_operator[nn.functional.conv_transpose?d-int64]": _INTEGERS,
    "ops/test_against_op_db.py::test_operator[scatter-errors]": _INDEX,
    "ops/test_against_op_db.py::test_operator[scatter_add-errors]": _INDEX,
    "ops/test_against_op_db.py::test_operator[tensor_split-*]": _HOST_INDICES,
    "ops/test_against_torch.py::test_*[tensor_split.tensor-*]": _HOST_INDICES,
    "ops/test_against_torch.py::test_forward[floor_divide-uint8-?]": _ZERO,
    "ops/test_against_torch.py::test_forward[fmod-uint8-?]": _ZERO,
    "ops/test_against_torch.py::test_forward[remainder-uint8-?]": _ZERO,
    "ops/test_compositions.py::test_errors_are_of_the_same_class[quantile below]": (
        "quantiles in device memory are not read (docs/differences.md)"
    ),
    "ops/test_numerics.py::test_float32_sums_are_those_of_double": (
        "a device adds float32 in float32; test_sums_in_float64_are_exact has both"
    ),
    "ops/test_numerics.py::test_probabilities_out_of_range_are_refused*": _WEIGHTS,
    "ops/test_random_values.py::test_normal_refuses_tensors_of_deviations_below_zero": (
        "deviations in device memory are not read (docs/differences.md)"
    ),
    "ops/test_thread_counts.py::*": _CPU_THREADS,
    "train/test_checkpoint.py::test_saver_killed_before_each_change_of_the_disk*": _FORK,
    "train/test_data.py::test_image_batches_cover_each_image_once_a_pass": (
        "training batches are made on the CPU, from means on the CPU"
    ),
    "io/test_exchange.py::test_*": _SHARED,
    "io/test_sharded_safetensors.py::test_a_killed_save_leaves_one_whole_save*": _FORK,
    "io/test_exchange_with_frameworks.py::test_*": _EXCHANGE,
    "nn/test_layers_against_torch.py::test_parameter_containers_repr": _REPR,
    "nn/test_layers_against_torch.py::test_parameter_repr": _REPR,
    "core/test_float8.py::test_comparing*": _FLOAT8,
    "core/test_float8.py::test_printing": _REPR,
    "core/test_float8_against_torch.py::*": _FLOAT8,
    "nn/test_float8_training.py::*": _FLOAT8,
    "ops/test_scaled_mm.py::*": _FLOAT8,
}
