"""Matrix products at the seams of the tiles: odd sizes, strides, unaligned starts, thread counts."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as vt

# Around the register tiles (6x16, 12x32), the panels and the size where tiles take over from BLAS.
SHAPES = [
    (1, 1, 1),
    (5, 15, 7),
    (6, 16, 256),
    (12, 32, 64),
    (13, 33, 65),
    (47, 95, 129),
    (96, 96, 96),
    (97, 193, 255),
    (128, 384, 128),
    (130, 66, 513),
    (257, 129, 300),
    (768, 128, 512),
    (3, 1000, 1000),
    (1000, 3, 1000),
    (1000, 1000, 3),
]


def _operand(array: np.ndarray, layout: str) -> vt.Tensor:
    """`array` as a tensor whose memory lies as `layout` says."""
    if layout == "transposed":
        return vt.as_tensor(np.ascontiguousarray(array.T)).t()
    if layout == "sliced":  # rows farther apart than their length, and an unaligned start
        wide = np.full((array.shape[0], array.shape[1] + 3), np.nan, np.float32)
        wide[:, 1:-2] = array
        return vt.as_tensor(wide)[:, 1:-2]
    if layout == "strided":  # no dimension with stride 1
        wide = np.full((array.shape[0], 2 * array.shape[1]), np.nan, np.float32)
        wide[:, ::2] = array
        return vt.as_tensor(wide)[:, ::2]
    return vt.as_tensor(array)


@pytest.mark.parametrize("b_layout", ["dense", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("a_layout", ["dense", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape: tuple[int, int, int], a_layout: str, b_layout: str) -> None:
    m, n, k = shape
    random = np.random.default_rng(m * 7 + n * 3 + k)
    a = random.standard_normal((m, k), dtype=np.float32)
    b = random.standard_normal((k, n), dtype=np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    # Rounding of a float32 sum of k products, in whatever order.
    bound = 4e-7 * np.sqrt(k) * (np.abs(a).max() * np.abs(b).max()) * max(np.log2(k), 1) + 1e-6
    before = vt.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            vt.set_num_threads(threads)
            results.append(_operand(a, a_layout) @ _operand(b, b_layout))
    finally:
        vt.set_num_threads(before)
    assert np.abs(results[0].numpy() - exact).max() <= bound
    assert all(vt.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("w_layout", ["dense", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("x_layout", ["dense", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", [(13, 33, 65), (97, 193, 255), (768, 128, 512)])
def test_linear_adds_its_bias(shape: tuple[int, int, int], x_layout: str, w_layout: str) -> None:
    m, n, k = shape
    random = np.random.default_rng(k)
    x, w, b = (random.standard_normal(s, dtype=np.float32) for s in ((m, k), (n, k), (n,)))
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + b
    linear = vt.nn.functional.linear
    got = linear(_operand(x, x_layout), _operand(w, w_layout), vt.as_tensor(b)).numpy()
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-6 * k)


def test_accumulates_into_what_is_there() -> None:
    random = np.random.default_rng(0)
    c, a, b = (
        random.standard_normal(s, dtype=np.float32) for s in ((130, 70), (130, 300), (300, 70))
    )
    exact = 0.5 * c + 2.0 * (a.astype(np.float64) @ b)
    got = vt.addmm(*map(vt.as_tensor, (c, a, b)), beta=0.5, alpha=2.0).numpy()
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)


def test_chain_matmul() -> None:
    random = np.random.default_rng(4)
    sizes = [3, 50, 2, 7, 5]
    arrays = [random.standard_normal(pair) for pair in zip(sizes, sizes[1:])]
    matrices = [vt.tensor(a, requires_grad=True) for a in arrays]
    product = vt.chain_matmul(*matrices)
    np.testing.assert_allclose(product.detach().numpy(), np.linalg.multi_dot(arrays), rtol=1e-12)
    product.sum().backward()
    after = np.linalg.multi_dot([*arrays[1:], np.ones((5, 1))])
    np.testing.assert_allclose(
        matrices[0].grad.numpy(), np.ones((3, 1)) @ after.T, rtol=1e-11, atol=1e-11
    )
    assert vt.equal(vt.chain_matmul(matrices[0]), matrices[0])
    out = vt.empty(0, dtype=vt.float64)
    with vt.no_grad():
        assert vt.chain_matmul(*matrices, out=out) is out and vt.equal(out, product)
    with pytest.raises(RuntimeError, match="3x50 and 7x5|3x50 and 2x7|cannot be multiplied"):
        vt.chain_matmul(matrices[0], matrices[2])
    with pytest.raises(RuntimeError, match="one or more matrices"):
        vt.chain_matmul()
    with pytest.raises(RuntimeError, match="dimension is 1, expected 2"):
        vt.chain_matmul(vt.ones(2))
