"""Fixtures that put a layer of ours beside torch's, with the same weights and inputs."""

import numpy as np
import pytest

import vibetensor.torch as vt


class AgainstTorch:
    """Moves values between the two through NumPy, and compares."""

    def __init__(self, torch):
        self.torch = torch
        self.random = np.random.default_rng(0)

    def ours(self, array, requires_grad=False):
        tensor = vt.as_tensor(np.array(array))
        return tensor.requires_grad_(requires_grad) if requires_grad else tensor

    def theirs(self, array, requires_grad=False):
        tensor = self.torch.from_numpy(np.array(array))
        return tensor.requires_grad_(requires_grad) if requires_grad else tensor

    def normal(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def copy_weights(self, reference, layer):
        state = {name: self.ours(t.detach().numpy()) for name, t in reference.state_dict().items()}
        layer.load_state_dict(state)

    def close(self, ours, theirs, rtol=2e-5, atol=2e-6):
        if theirs is None or ours is None:
            assert theirs is None and ours is None
            return
        assert tuple(ours.shape) == tuple(theirs.shape)
        assert str(ours.dtype) == str(theirs.dtype)
        np.testing.assert_allclose(
            ours.detach().numpy(), theirs.detach().numpy(), rtol=rtol, atol=atol
        )

    def same(self, f_ours, f_theirs, *arrays, **tolerance):
        """Values of both functions, and gradients of their sums weighted by fixed numbers."""
        mine = [self.ours(a, a.dtype.kind == "f") for a in arrays]
        others = [self.theirs(a, a.dtype.kind == "f") for a in arrays]
        out, expected = f_ours(*mine), f_theirs(*others)
        if isinstance(expected, tuple):
            for a, b in zip(out, expected):
                self.close(a, b, **tolerance)
            out, expected = out[0], expected[0]
        else:
            self.close(out, expected, **tolerance)
        if vt.is_grad_enabled() and expected.requires_grad:
            weights = self.random.standard_normal(tuple(expected.shape)).astype(np.float32)
            (out * self.ours(weights)).sum().backward()
            (expected * self.theirs(weights)).sum().backward()
            for a, b in zip(mine, others):
                self.close(a.grad, b.grad, **tolerance)
        return out, expected

    def same_error(self, f_ours, f_theirs, *, text=True):
        """Both raise the same class, with the same message."""
        with pytest.raises(Exception) as theirs:
            f_theirs()
        with pytest.raises(Exception) as ours:
            f_ours()
        assert ours.type.__name__ == theirs.type.__name__
        if text:
            assert str(ours.value) == str(theirs.value)


@pytest.fixture
def against_torch():
    torch = pytest.importorskip("torch")
    return AgainstTorch(torch)
