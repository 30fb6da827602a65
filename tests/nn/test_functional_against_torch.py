"""functional: what the layers do not already cover."""

import inspect
import warnings

import numpy as np
import pytest

import vibetensor.torch as vt

pytestmark = pytest.mark.torch

F = vt.nn.functional

# name, input shapes, options
CALLS = [
    ("normalize", [(3, 4)], {}),
    ("normalize", [(3, 4)], {"p": 1.0, "dim": 0}),
    ("cosine_similarity", [(3, 4), (3, 4)], {"dim": 0}),
    ("pairwise_distance", [(3, 4), (3, 4)], {"p": 1.0, "keepdim": True}),
    ("glu", [(4, 6)], {"dim": 0}),
    ("threshold", [(4, 6)], {"threshold": 0.2, "value": -1.0}),
    ("softmax", [(4, 6)], {"dim": 0, "dtype": "float64"}),
    ("log_softmax", [(4, 6)], {"dim": -1, "dtype": "float64"}),
    ("pad", [(2, 3)], {"pad": (1, 2)}),
    ("pad", [(2, 3)], {"pad": (1, -1, 0, 2), "value": 3.0}),
    ("pad", [(2, 3, 4)], {"pad": (2, 1), "mode": "reflect"}),
    ("pad", [(2, 3, 4, 5)], {"pad": (2, 1, 1, 0), "mode": "replicate"}),
    ("pad", [(2, 3, 4, 5)], {"pad": (2, 1, 1, 0), "mode": "circular"}),
    ("conv_transpose1d", [(2, 4, 5), (4, 3, 3), (3,)], {"stride": 2, "padding": 1}),
    (
        "conv_transpose2d",
        [(2, 4, 5, 4), (4, 3, 3, 2), (6,)],
        {"stride": 2, "output_padding": 1, "groups": 2},
    ),
    ("unfold", [(2, 3, 5, 4)], {"kernel_size": (2, 3), "padding": 1, "stride": 2}),
    ("fold", [(2, 12, 12)], {"output_size": (4, 5), "kernel_size": 2}),
    ("linear", [(2, 3), (4, 3), (4,)], {}),
    ("linear", [(3,), (4, 3)], {}),
    ("smooth_l1_loss", [(3, 4), (3, 4)], {"beta": 0.3}),
    ("smooth_l1_loss", [(3, 4), (3, 4)], {"beta": 0.0}),
    ("huber_loss", [(3, 4), (3, 4)], {"delta": 0.5, "reduction": "sum"}),
    ("margin_ranking_loss", [(3, 4), (3, 4), (3, 4)], {"margin": 0.3}),
    ("hinge_embedding_loss", [(3, 4), (3, 4)], {"margin": 0.3, "reduction": "sum"}),
    ("cosine_embedding_loss", [(3, 4), (3, 4), (3,)], {"margin": 0.1}),
    ("instance_norm", [(2, 3, 4)], {"eps": 1e-3}),
    ("mse_loss", [(3, 4), (3, 4), (3, 4)], {"named": ("input", "target", "weight")}),
    ("rms_norm", [(3, 4), (4,)], {"normalized_shape": (4,), "named": ("input", "weight")}),
    ("scaled_dot_product_attention", [(2, 3, 5, 4)] * 3, {}),
    ("scaled_dot_product_attention", [(2, 3, 5, 4)] * 3, {"is_causal": True, "scale": 0.3}),
    (
        "scaled_dot_product_attention",
        [(2, 4, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3)],
        {"enable_gqa": True},
    ),
    (
        "scaled_dot_product_attention",
        [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), (5, 6)],
        {"named": ("query", "key", "value", "attn_mask")},
    ),
]


TARGET_IS_A_SIGN = ("margin_ranking_loss", "hinge_embedding_loss", "cosine_embedding_loss")


@pytest.mark.parametrize(("name", "shapes", "options"), CALLS)
def test_call(against_torch, name, shapes, options):
    options = dict(options)
    named = options.pop("named", None)

    def call(torch):
        chosen = dict(options)
        if "dtype" in chosen:
            chosen["dtype"] = getattr(torch, chosen["dtype"])
        function = getattr(torch.nn.functional, name)
        if named is None:
            return lambda *tensors: function(*tensors, **chosen)
        return lambda *tensors: function(**dict(zip(named, tensors)), **chosen)

    arrays = [against_torch.normal(*s) for s in shapes]
    if name in TARGET_IS_A_SIGN:
        arrays[-1] = np.sign(arrays[-1])
    against_torch.same(call(vt), call(against_torch.torch), *arrays, rtol=1e-4, atol=1e-5)


# Keywords that torch does not have.
ADDED = {"cross_entropy": ["z_loss"], "linear_cross_entropy": ["z_loss"]}


@pytest.mark.parametrize(
    "name", [n for n in F.__all__ if n not in ("scaled_dot_product_attention", "one_hot", "pad")]
)
def test_signature(against_torch, name):
    theirs = getattr(against_torch.torch.nn.functional, name)
    try:
        expected = inspect.signature(theirs)
    except ValueError:
        pytest.skip("a builtin there")
    if list(expected.parameters) == ["args", "kwargs"]:
        pytest.skip("chosen by a flag there")
    mine = inspect.signature(getattr(F, name)).parameters
    mine = {n: p for n, p in mine.items() if n not in ADDED.get(name, ())}
    assert list(mine) == list(expected.parameters)
    for parameter, other in zip(mine.values(), expected.parameters.values()):
        # Dtypes are others of the same name.
        assert parameter.default == other.default or repr(parameter.default) == repr(other.default)
        assert parameter.kind == other.kind


@pytest.mark.parametrize(
    "name",
    ["relu", "silu", "mish", "leaky_relu", "elu", "selu", "celu", "hardtanh", "relu6",
     "hardsigmoid", "hardswish"],
)  # fmt: skip
def test_in_place(against_torch, name):
    array = against_torch.normal(3, 4)
    x = against_torch.ours(array)
    result = getattr(F, name)(x, inplace=True)
    assert result is x
    expected = getattr(against_torch.torch.nn.functional, name)(against_torch.theirs(array))
    against_torch.close(x, expected)


def test_embedding_renormalises_in_place(against_torch):
    weight, index = against_torch.normal(5, 4) * 3, np.array([1, 3, 3])
    mine, theirs = against_torch.ours(weight), against_torch.theirs(weight)
    out = F.embedding(against_torch.ours(index), mine, max_norm=1.0)
    expected = against_torch.torch.nn.functional.embedding(
        against_torch.theirs(index), theirs, max_norm=1.0
    )
    against_torch.close(out, expected)
    against_torch.close(mine, theirs)
    with pytest.raises(NotImplementedError, match="sparse"):
        F.embedding(against_torch.ours(index), mine, sparse=True)


def test_one_hot(against_torch):
    index = np.array([[0, 2], [1, 3]])
    G = against_torch.torch.nn.functional
    for classes in (-1, 6):
        against_torch.close(
            F.one_hot(against_torch.ours(index), classes),
            G.one_hot(against_torch.theirs(index), classes),
        )


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d"])
def test_dropout(against_torch, name):
    vt.manual_seed(0)
    function = getattr(F, name)
    x = vt.ones(200, 50, 4, 4) if name == "dropout2d" else vt.ones(200, 50, 4)
    out = function(x, 0.25).numpy()
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.02)
    if name != "dropout":
        flat = out.reshape(200, 50, -1)
        assert (flat.min(-1) == flat.max(-1)).all()
    assert function(x, 0.25, training=False) is x or name == "dropout"
    assert (function(x, 1.0).numpy() == 0).all()
    same = x.clone()
    assert function(same, 0.5, inplace=True) is same and (same.numpy() == 0).any()
    against_torch.same_error(
        lambda: function(x, -0.1),
        lambda: getattr(against_torch.torch.nn.functional, name)(
            against_torch.torch.ones(2, 2, 2), -0.1
        ),
    )


def test_gumbel_softmax(against_torch):
    vt.manual_seed(0)
    logits = vt.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3).contiguous().requires_grad_()
    hard = F.gumbel_softmax(logits, hard=True)
    # 1 - soft + soft rounds to 1 exactly, whatever the soft value between 0 and 1 is.
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(-1) == 1).all()
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    np.testing.assert_allclose(hard.detach().numpy().mean(0), expected, atol=0.02)
    (hard * vt.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert bool((logits.grad != 0).any())


def test_warnings(against_torch):
    a, b = (
        against_torch.ours(np.ones((2, 3), np.float32)),
        against_torch.ours(np.ones(3, np.float32)),
    )
    with pytest.warns(UserWarning, match="target size"):
        F.mse_loss(a, b)
    with pytest.warns(UserWarning, match="batchmean"):
        F.kl_div(a, a)
    with pytest.warns(UserWarning, match="Implicit dimension"):
        F.softmax(a)
    with pytest.warns(UserWarning, match="reduction='sum'"):
        total = F.mse_loss(a, a * 2, size_average=False)
    assert total.item() == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.mse_loss(a, a)
