"""Tests that compare with PyTorch 2.13 and do not hold for an older one, each with what differs.

The extra `test-torch` pins 2.13, so nothing here is skipped with it. A GPU machine may have another.
Patterns are as in cuda/not_on_device.py.
"""

VERSION = (2, 13)

_BIAS = "its norms have no `bias`, in the constructor and in their repr"
_INDEX_DTYPES = "it takes no int32 or uint8 indices, or checks them otherwise"
_NAN = "its 16-bit remainder and division give NaN or another neighbour"

OLDER_PYTORCH: dict[str, str] = {
    "nn/test_functional_against_torch.py::test_signature[linear_cross_entropy]": "it has none",
    "nn/test_layers_against_torch.py::test_layer[LayerNorm-*]": _BIAS,
    "nn/test_layers_against_torch.py::test_layer[GroupNorm-*]": _BIAS,
    "nn/test_layers_against_torch.py::test_layer[BatchNorm?d-*]": _BIAS,
    "nn/test_layers_against_torch.py::test_layer[TransformerEncoderLayer-*]": _BIAS,
    "nn/test_layers_against_torch.py::test_transformer_encoder": _BIAS,
    "nn/test_module_against_torch.py::test_a_training_step_of_a_small_gpt": _BIAS,
    "ops/test_against_op_db.py::test_operator[gather-gradients]": _INDEX_DTYPES,
    "ops/test_against_op_db.py::test_operator[index_add-errors]": _INDEX_DTYPES,
    "ops/test_against_op_db.py::test_operator[scatter-*]": _INDEX_DTYPES,
    "ops/test_against_op_db.py::test_operator[div.trunc_rounding-bfloat16]": _NAN,
    "ops/test_against_op_db.py::test_operator[fmod-bfloat16]": _NAN,
    "ops/test_against_op_db.py::test_operator[remainder-bfloat16]": _NAN,
    "ops/test_against_op_db.py::test_list_names_tests_that_exist": "it has fewer operator samples",
    "ops/test_numerics.py::test_errors_match_torch[<lambda>-ValueError]": (
        "a range of integers whose step rounds to 0 ends its process"
    ),
    "ops/test_against_op_db.py::test_operator[arange-errors]": "it refuses a range that 2.13 allows",
    "ops/test_against_torch.py::test_forward[trace-*float16-0]": "it has no trace of 16-bit floats",
}
