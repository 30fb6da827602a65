"""Every layer with torch's weights: repr, state, outputs and all gradients."""

import warnings

import numpy as np
import pytest

import vibetensor.torch as vt

pytestmark = pytest.mark.torch

INDICES = np.array([[1, 2, 0], [3, 2, 1]])

# (layer, arguments, options, input shapes or arrays)
LAYERS = [
    ("Identity", (), {}, [(2, 3)]),
    ("Linear", (5, 3), {}, [(4, 5)]),
    ("Linear", (5, 3), {"bias": False}, [(2, 4, 5)]),
    ("Bilinear", (3, 4, 5), {}, [(2, 3), (2, 4)]),
    ("Bilinear", (3, 4, 5), {"bias": False}, [(2, 6, 3), (2, 6, 4)]),
    ("Embedding", (6, 4), {}, [INDICES]),
    ("Embedding", (6, 4), {"padding_idx": 2}, [INDICES]),
    ("Embedding", (6, 4), {"padding_idx": -1}, [INDICES]),
    ("LayerNorm", (6,), {}, [(3, 6)]),
    ("LayerNorm", ((4, 6),), {"eps": 1e-3}, [(3, 4, 6)]),
    ("LayerNorm", (6,), {"elementwise_affine": False}, [(3, 6)]),
    ("LayerNorm", (6,), {"bias": False}, [(3, 6)]),
    ("RMSNorm", (6,), {}, [(3, 6)]),
    ("RMSNorm", ((4, 6),), {"eps": 1e-3, "elementwise_affine": False}, [(3, 4, 6)]),
    ("GroupNorm", (2, 6), {}, [(3, 6, 5)]),
    ("GroupNorm", (3, 6), {"affine": False}, [(2, 6, 4, 4)]),
    ("GroupNorm", (3, 6), {"bias": False}, [(2, 6, 4, 4)]),
    ("BatchNorm1d", (4,), {}, [(5, 4)]),
    ("BatchNorm1d", (4,), {"affine": False}, [(5, 4, 3)]),
    ("BatchNorm2d", (4,), {}, [(2, 4, 3, 3)]),
    ("BatchNorm2d", (4,), {"momentum": None}, [(2, 4, 3, 3)]),
    ("BatchNorm2d", (4,), {"bias": False}, [(2, 4, 3, 3)]),
    ("BatchNorm2d", (4,), {"track_running_stats": False}, [(2, 4, 3, 3)]),
    ("Conv1d", (4, 6, 3), {}, [(2, 4, 10)]),
    ("Conv1d", (4, 6, 4), {"padding": "same"}, [(2, 4, 10)]),
    ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1, "padding_mode": "circular"}, [(4, 10)]),
    ("Conv2d", (4, 6, 3), {}, [(2, 4, 8, 8)]),
    ("Conv2d", (4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}, [(2, 4, 8, 8)]),
    ("Conv2d", (4, 6, 3), {"groups": 2, "dilation": 2, "bias": False}, [(2, 4, 9, 9)]),
    ("Conv2d", (4, 4, (3, 4)), {"padding": "same", "groups": 4}, [(2, 4, 8, 8)]),
    ("Conv2d", (4, 6, 3), {"padding": "valid"}, [(4, 8, 8)]),
    ("Conv2d", (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, [(2, 2, 6, 6)]),
    ("Conv2d", (2, 3, 3), {"padding": (1, 2), "padding_mode": "replicate"}, [(2, 2, 6, 6)]),
    ("Conv2d", (2, 3, 3), {"padding": "same", "padding_mode": "circular"}, [(2, 2, 6, 6)]),
    ("MaxPool1d", (2,), {}, [(2, 3, 8)]),
    ("MaxPool1d", (3,), {"stride": 2, "return_indices": True}, [(3, 9)]),
    ("MaxPool2d", (2,), {}, [(2, 3, 8, 8)]),
    ("MaxPool2d", (3, 2, 1), {"ceil_mode": True}, [(2, 3, 8, 7)]),
    ("MaxPool2d", (2,), {"return_indices": True, "dilation": 2}, [(2, 3, 8, 8)]),
    ("AvgPool1d", (3,), {"stride": 2, "padding": 1}, [(2, 3, 8)]),
    ("AvgPool2d", (2,), {}, [(2, 3, 8, 8)]),
    ("AvgPool2d", (3, 2, 1), {"count_include_pad": False, "ceil_mode": True}, [(2, 3, 8, 7)]),
    ("AvgPool2d", (2,), {"divisor_override": 3}, [(3, 8, 8)]),
    ("AdaptiveAvgPool1d", (3,), {}, [(2, 3, 8)]),
    ("AdaptiveAvgPool2d", (3,), {}, [(2, 3, 8, 7)]),
    ("AdaptiveAvgPool2d", ((2, None),), {}, [(2, 3, 8, 7)]),
    ("Flatten", (), {}, [(2, 3, 4)]),
    ("Flatten", (0, 1), {}, [(2, 3, 4)]),
    ("Unflatten", (1, (2, 3)), {}, [(2, 6, 4)]),
    ("ReLU", (), {}, [(3, 4)]),
    ("ReLU6", (), {}, [(3, 4)]),
    ("GELU", (), {}, [(3, 4)]),
    ("GELU", (), {"approximate": "tanh"}, [(3, 4)]),
    ("SiLU", (), {}, [(3, 4)]),
    ("Mish", (), {}, [(3, 4)]),
    ("SELU", (), {}, [(3, 4)]),
    ("CELU", (0.7,), {}, [(3, 4)]),
    ("ELU", (), {"alpha": 0.5}, [(3, 4)]),
    ("Softplus", (), {"beta": 2.0, "threshold": 1.5}, [(3, 4)]),
    ("LeakyReLU", (0.1,), {}, [(3, 4)]),
    ("Hardtanh", (-0.5, 0.7), {}, [(3, 4)]),
    ("Hardsigmoid", (), {}, [(3, 4)]),
    ("Hardswish", (), {}, [(3, 4)]),
    ("Hardshrink", (), {}, [(3, 4)]),
    ("Softshrink", (0.3,), {}, [(3, 4)]),
    ("Tanhshrink", (), {}, [(3, 4)]),
    ("Softsign", (), {}, [(3, 4)]),
    ("Threshold", (0.1, 20.0), {}, [(3, 4)]),
    ("LogSigmoid", (), {}, [(3, 4)]),
    ("Tanh", (), {}, [(3, 4)]),
    ("Sigmoid", (), {}, [(3, 4)]),
    ("PReLU", (), {}, [(3, 4)]),
    ("PReLU", (4,), {"init": 0.1}, [(3, 4, 2)]),
    ("GLU", (1,), {}, [(3, 4)]),
    ("Softmax", (1,), {}, [(3, 4)]),
    ("LogSoftmax", (-1,), {}, [(3, 4)]),
    ("Softmin", (0,), {}, [(3, 4)]),
    ("Softmax2d", (), {}, [(2, 3, 4, 4)]),
    ("CosineSimilarity", (), {}, [(3, 4), (3, 4)]),
    ("PairwiseDistance", (), {}, [(3, 4), (3, 4)]),
    ("MultiheadAttention", (8, 2), {}, [(5, 3, 8), (6, 3, 8), (6, 3, 8)]),
    ("MultiheadAttention", (8, 2), {"bias": False, "batch_first": True}, [(3, 5, 8)] * 3),
    ("MultiheadAttention", (8, 2), {"kdim": 5, "vdim": 7}, [(5, 3, 8), (6, 3, 5), (6, 3, 7)]),
    ("MultiheadAttention", (8, 4), {"add_bias_kv": True, "add_zero_attn": True}, [(5, 8)] * 3),
    ("TransformerEncoderLayer", (8, 2, 16), {"dropout": 0.0}, [(5, 3, 8)]),
    (
        "TransformerEncoderLayer",
        (8, 2, 16),
        {"dropout": 0.0, "norm_first": True, "batch_first": True, "activation": "gelu"},
        [(3, 5, 8)],
    ),
]


def build(nn, name, args, options):
    return getattr(nn, name)(*args, **options)


def both(against, name, args, options):
    reference = build(against.torch.nn, name, args, options)
    return build(vt.nn, name, args, options), reference


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "args", "options", "inputs"), LAYERS)
def test_layer(against_torch, name, args, options, inputs):
    layer, reference = both(against_torch, name, args, options)
    assert repr(layer) == repr(reference)
    own, other = layer.state_dict(), reference.state_dict()
    assert list(own) == list(other)
    assert [tuple(t.shape) for t in own.values()] == [tuple(t.shape) for t in other.values()]
    assert [str(t.dtype) for t in own.values()] == [str(t.dtype) for t in other.values()]
    assert dict(own._metadata) == dict(other._metadata)

    for parameter in reference.parameters():
        parameter.data.add_(0.1)
    against_torch.copy_weights(reference, layer)
    arrays = [i if isinstance(i, np.ndarray) else against_torch.normal(*i) for i in inputs]
    against_torch.same(layer, reference, *arrays, rtol=1e-4, atol=1e-5)
    for (path, mine), (_, theirs) in zip(layer.named_parameters(), reference.named_parameters()):
        assert mine.grad is not None or theirs.grad is None, path
        against_torch.close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(layer.buffers(), reference.buffers()):
        against_torch.close(mine, theirs)
    # And in evaluation, where batch norm uses what it has gathered.
    with vt.no_grad(), against_torch.torch.no_grad():
        against_torch.same(layer.eval(), reference.eval(), *arrays, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "name", ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCEWithLogitsLoss", "BCELoss"]
)
def test_elementwise_loss(against_torch, name, reduction):
    layer, reference = both(against_torch, name, (), {"reduction": reduction})
    assert repr(layer) == repr(reference)
    x, t = against_torch.normal(4, 3), against_torch.normal(4, 3)
    if name.startswith("BCE"):
        t = (t > 0).astype(np.float32)
    if name == "BCELoss":
        x = 1 / (1 + np.exp(-x))
    against_torch.same(
        lambda a: layer(a, against_torch.ours(t)),
        lambda a: reference(a, against_torch.theirs(t)),
        x,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(against_torch, reduction, log_target):
    logs = np.log(np.random.default_rng(1).dirichlet(np.ones(4), 3)).astype(np.float32)
    target = np.log(np.random.default_rng(2).dirichlet(np.ones(4), 3)).astype(np.float32)
    target = target if log_target else np.exp(target)
    for how in (reduction, "batchmean"):
        layer, reference = both(
            against_torch, "KLDivLoss", (), {"reduction": how, "log_target": log_target}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            against_torch.same(layer, reference, logs, target)


@pytest.mark.parametrize("shape", [(5, 4), (4,), (3, 4, 2), (2, 4, 3, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 1},
        {"label_smoothing": 0.1},
        {"weighted": True},
        {"weighted": True, "ignore_index": 2, "label_smoothing": 0.2},
    ],
)
def test_class_losses(against_torch, shape, options):
    options = dict(options)
    weighted = options.pop("weighted", False)
    weight = np.array([0.5, 1.0, 2.0, 1.5], np.float32)
    x = against_torch.normal(*shape)
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = np.array(np.random.default_rng(3).integers(0, 4, target_shape))
    for name in ("CrossEntropyLoss", "NLLLoss"):
        if name == "NLLLoss":
            options.pop("label_smoothing", None)
        mine = {**options, "weight": against_torch.ours(weight)} if weighted else options
        other = {**options, "weight": against_torch.theirs(weight)} if weighted else options
        layer = getattr(vt.nn, name)(**mine)
        reference = getattr(against_torch.torch.nn, name)(**other)
        assert repr(layer) == repr(reference)
        against_torch.same(
            lambda a, layer=layer: layer(a, against_torch.ours(target)),
            lambda a, reference=reference: reference(a, against_torch.theirs(target)),
            x,
        )


def test_cross_entropy_of_probabilities(against_torch):
    target = np.random.default_rng(1).dirichlet(np.ones(4), 3).astype(np.float32)
    F, G = vt.nn.functional, against_torch.torch.nn.functional
    x = against_torch.normal(3, 4)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        against_torch.same(
            lambda a, options=options: F.cross_entropy(a, against_torch.ours(target), **options),
            lambda a, options=options: G.cross_entropy(a, against_torch.theirs(target), **options),
            x,
        )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["bool", "float", "padding", "both", "heads", "causal"])
def test_attention_masks(against_torch, need_weights, masks):
    layer, reference = both(against_torch, "MultiheadAttention", (8, 2), {"batch_first": True})
    against_torch.copy_weights(reference, layer)
    rng = np.random.default_rng(0)
    causal = np.triu(np.ones((5, 5), bool), 1)
    options = {
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": rng.standard_normal((5, 5)).astype(np.float32)},
        "padding": {"key_padding_mask": np.arange(5)[None] >= np.array([[5], [3], [4]])},
        "both": {
            "attn_mask": causal,
            "key_padding_mask": np.arange(5)[None] >= np.array([[5], [3], [4]]),
        },
        "heads": {"attn_mask": rng.standard_normal((6, 5, 5)).astype(np.float32)},
        "causal": {"attn_mask": causal},
    }[masks]
    extra = {"need_weights": need_weights, "average_attn_weights": masks != "bool"}
    if masks == "causal":
        extra["is_causal"] = True
    x = against_torch.normal(3, 5, 8)
    against_torch.same(
        lambda a: layer(a, a, a, **{k: against_torch.ours(v) for k, v in options.items()}, **extra),
        lambda a: reference(
            a, a, a, **{k: against_torch.theirs(v) for k, v in options.items()}, **extra
        ),
        x,
        rtol=1e-4,
        atol=1e-5,
    )


def test_transformer_encoder(against_torch):
    def build_on(nn):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False)

    layer, reference = build_on(vt.nn), build_on(against_torch.torch.nn)
    assert repr(layer) == repr(reference)
    for parameter in reference.parameters():
        parameter.data.mul_(1.1).add_(0.01)
    against_torch.copy_weights(reference, layer)
    mask = np.triu(np.full((5, 5), -np.inf, np.float32), 1)
    for options in ({}, {"mask": mask}):
        against_torch.same(
            lambda a, o=options: layer(a, **{k: against_torch.ours(v) for k, v in o.items()}),
            lambda a, o=options: reference(a, **{k: against_torch.theirs(v) for k, v in o.items()}),
            against_torch.normal(3, 5, 8),
            rtol=1e-4,
            atol=1e-5,
        )
    for mine, theirs in zip(layer.parameters(), reference.parameters()):
        against_torch.close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


WRONG = [
    ("Conv2d", (3, 4, 3), {"groups": 2}),
    ("Conv2d", (4, 4, 3), {"groups": 0}),
    ("Conv2d", (4, 4, 3), {"stride": 2, "padding": "same"}),
    ("Dropout", (1.5,), {}),
    ("Embedding", (3, 4), {"padding_idx": 3}),
    ("GroupNorm", (4, 6), {}),
    ("MultiheadAttention", (7, 2), {}),
    ("MultiheadAttention", (0, 2), {}),
    ("TransformerEncoderLayer", (8, 2), {"activation": "tanh"}),
]


@pytest.mark.parametrize(("name", "args", "options"), WRONG)
def test_wrong_settings(against_torch, name, args, options):
    against_torch.same_error(
        lambda: build(vt.nn, name, args, options),
        lambda: build(against_torch.torch.nn, name, args, options),
    )


def test_wrong_inputs(against_torch):
    for name, args, shape in [
        ("BatchNorm1d", (4,), (2, 4, 3, 3)),
        ("BatchNorm2d", (4,), (2, 4)),
        ("BatchNorm1d", (4,), (1, 4)),
    ]:
        layer, reference = both(against_torch, name, args, {})
        x = against_torch.normal(*shape)
        against_torch.same_error(
            lambda layer=layer, x=x: layer(against_torch.ours(x)),
            lambda reference=reference, x=x: reference(against_torch.theirs(x)),
        )
    F, G = vt.nn.functional, against_torch.torch.nn.functional
    x = against_torch.normal(3, 4)
    against_torch.same_error(
        lambda: F.mse_loss(against_torch.ours(x), against_torch.ours(x), reduction="median"),
        lambda: G.mse_loss(against_torch.theirs(x), against_torch.theirs(x), reduction="median"),
    )
    against_torch.same_error(
        lambda: F.binary_cross_entropy_with_logits(
            against_torch.ours(x), against_torch.ours(x[:2])
        ),
        lambda: G.binary_cross_entropy_with_logits(
            against_torch.theirs(x), against_torch.theirs(x[:2])
        ),
    )


def test_more_reprs(against_torch):
    def several(nn):
        return [
            nn.ReLU(inplace=True),
            nn.ReLU6(inplace=True),
            nn.LeakyReLU(inplace=True),
            nn.ELU(inplace=True),
            nn.Hardtanh(inplace=True),
            nn.Hardswish(inplace=True),
            nn.Threshold(0.5, 1.0, inplace=True),
            nn.RReLU(),
            nn.Dropout(0.2, inplace=True),
            nn.Dropout1d(),
            nn.Dropout2d(0.3),
            nn.Embedding(5, 2, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True),
            nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.CosineEmbeddingLoss(),
            nn.Sequential(),
            nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1))),
            nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()]),
            nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Tanh()] * 3)}),
            nn.MaxPool2d((2, 3), stride=(1, 2)),
        ]

    for mine, theirs in zip(several(vt.nn), several(against_torch.torch.nn)):
        assert repr(mine) == repr(theirs)


def test_parameter_containers_repr(against_torch):
    def several(torch):
        nn = torch.nn
        return [
            nn.ParameterList(),
            nn.ParameterList([torch.ones(2, 3), 5]),
            nn.ParameterDict({"a": torch.ones(2), "b": "text"}),
        ]

    for mine, theirs in zip(several(vt), several(against_torch.torch)):
        assert repr(mine) == repr(theirs)
        assert list(mine.state_dict()) == list(theirs.state_dict())


def test_parameter_repr(against_torch):
    mine = vt.nn.Parameter(vt.ones(2))
    theirs = against_torch.torch.nn.Parameter(against_torch.torch.ones(2))
    assert repr(mine) == repr(theirs) and str(mine) == str(theirs)
