"""An op of one's own: gelu(x * scale + y), one CuTe kernel for its forward."""

import math

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor import cute_kernels
from vibetensor.cute_kernels import Contract, Extent, Scalar, Tensor
from vibetensor.cute_kernels.dsl import DTYPES, CUstream, Float32, Int64, cute, cutlass

THREADS, WIDTH = 256, 8


def contract(dtype: str) -> Contract:
    """x, y and z are dense, and their elements come in eights."""
    return Contract(
        extents=(Extent("n", divisible_by=WIDTH),),
        tensors=(
            Tensor("x", dtype, ("n",)),
            Tensor("y", dtype, ("n",)),
            Tensor("z", dtype, ("n",), "write"),
        ),
        scalars=(Scalar("scale", "float32"),),
    )


class ScaleAddGelu:
    def __init__(self, dtype: str) -> None:
        self.dtype = DTYPES[dtype]

    @cute.jit
    def __call__(
        self, x: cute.Tensor, y: cute.Tensor, z: cute.Tensor, scale: Float32, stream: CUstream
    ):
        self.kernel(x, y, z, scale).launch(
            grid=[cute.ceil_div(x.shape[0], THREADS * WIDTH), 1, 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, z: cute.Tensor, scale: Float32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        first = (Int64(block) * THREADS + thread) * WIDTH
        if first < Int64(x.shape[0]):
            a = cute.make_rmem_tensor((WIDTH,), self.dtype)
            b = cute.make_rmem_tensor((WIDTH,), self.dtype)
            for tensor, to in ((x, a), (y, b)):
                there = cute.make_tensor(
                    (tensor.iterator + first).align(16), cute.make_layout(WIDTH)
                )
                cute.autovec_copy(there, to)
            sums = cute.make_rmem_tensor((WIDTH,), Float32)
            sums.store(a.load().to(Float32) * scale + b.load().to(Float32))
            for i in cutlass.range_constexpr(WIDTH):
                sums[i] = 0.5 * sums[i] * (1.0 + cute.math.erf(sums[i] * math.sqrt(0.5)))
            a.store(sums.load().to(self.dtype))
            there = cute.make_tensor((z.iterator + first).align(16), cute.make_layout(WIDTH))
            cute.autovec_copy(a, there)


def reference(x, y, scale):
    """What the kernel computes, in ops that are there on every device."""
    return F.gelu(torch.add(y, x, alpha=scale))


def backward(grad, x, y, scale):
    """The gradients of x and y."""
    z = torch.add(y, x, alpha=scale)
    below = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    slope = grad * (below + z * density)
    return slope * scale, slope


scale_add_gelu = cute_kernels.register(
    "example::scale_add_gelu",
    "(Tensor x, Tensor y, float scale=1.0) -> Tensor z",
    kernel=ScaleAddGelu,
    contract=contract,
    variants=("bfloat16", "float16", "float32"),
    reference=reference,
    backward=backward,
    capture="pointwise",
)
