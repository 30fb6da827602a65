"""AdamW over many tensors in one launch: float32 master weights, moments and arithmetic; gradients
in float32 or bfloat16; the weights' bfloat16 copies are written in the same pass.

`tensors` has a row of six for each tensor: the addresses of master weight, gradient, first moment,
second moment and copy (0: none), each aligned to 16 bytes, and the number of elements. `chunks` has
a row for each block: which tensor, and the first of the CHUNK elements that are the block's. Learning
rate, step count, the scale of the gradients and whether the step is skipped are read from device
memory, so that a captured step follows them. `numbers` holds: learning rate, step (counted from 1),
factor on the gradients, and nonzero to skip. keep1 is 1 - beta1, log_beta1 the natural logarithm of beta1:
computed on the host in double precision, because 1 - beta2 in float32 has lost four digits.
"""

from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import BFloat16, CUstream, Float32, Int64, cute, cutlass
from ..registry import Kernel, register

CHUNK = 8192
WIDTH = 4


@dataclass(frozen=True)
class AdamWVariant:
    """dtype of the gradients, and threads of a block."""

    gradients: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.gradients}_{self.threads}"


VARIANTS = tuple(AdamWVariant(g, t) for g in ("f32", "bf16") for t in (256, 512))


def contract(v: AdamWVariant) -> Contract:
    return Contract(
        extents=(
            Extent("count"),
            Extent("six", minimum=6, maximum=6),
            Extent("blocks"),
            Extent("two", minimum=2, maximum=2),
            Extent("four", minimum=4, maximum=4),
        ),
        tensors=(
            Tensor("tensors", "int64", ("count", "six"), align=8, stride_divisible_by=2),
            Tensor("chunks", "int64", ("blocks", "two"), align=8, stride_divisible_by=2),
            Tensor("numbers", "float32", ("four",), align=4),
        ),
        scalars=tuple(
            Scalar(name, "float32")
            for name in ("keep1", "keep2", "log_beta1", "log_beta2", "weight_decay", "eps")
        ),
    )


class AdamWStep:
    def __init__(self, variant: AdamWVariant):
        self.threads = variant.threads
        self.gradients = BFloat16 if variant.gradients == "bf16" else Float32

    @cute.jit
    def __call__(
        self,
        tensors: cute.Tensor,
        chunks: cute.Tensor,
        numbers: cute.Tensor,
        keep1: Float32,
        keep2: Float32,
        log_beta1: Float32,
        log_beta2: Float32,
        weight_decay: Float32,
        eps: Float32,
        stream: CUstream,
    ):
        self.kernel(
            tensors, chunks, numbers, keep1, keep2, log_beta1, log_beta2, weight_decay, eps
        ).launch(grid=[chunks.shape[0], 1, 1], block=[self.threads, 1, 1], stream=stream)

    @cute.jit
    def elements(self, address: Int64, dtype: cutlass.Constexpr, first: Int64):
        """WIDTH elements from `first` of the tensor at `address`."""
        width_bytes = WIDTH * dtype.width // 8
        start = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=width_bytes)
        return cute.make_tensor((start + first).align(width_bytes), cute.make_layout(WIDTH))

    @cute.jit
    def bias_correction(self, x: Float32):
        """1 - exp(x) for x <= 0. By its series near 0, where the difference would lose what counts:
        beta2 = 0.999 leaves 0.001 after the first step."""
        result = Float32(1) - cute.math.exp2(x * Float32(1.4426950408889634))
        if x > Float32(-0.125):
            series = Float32(1)
            for k in cutlass.range_constexpr(6, 1, -1):
                series = Float32(1) + series * x * Float32(1 / k)
            result = -x * series
        return result

    @cute.kernel
    def kernel(
        self,
        tensors: cute.Tensor,
        chunks: cute.Tensor,
        numbers: cute.Tensor,
        keep1: Float32,
        keep2: Float32,
        log_beta1: Float32,
        log_beta2: Float32,
        weight_decay: Float32,
        eps: Float32,
    ):
        t, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        rate, step, factor, skip = numbers[0], numbers[1], numbers[2], numbers[3]
        if skip == Float32(0):
            which = chunks[block, 0]
            begin = chunks[block, 1]
            numel = tensors[which, 5]
            end = begin + Int64(CHUNK)
            if end > numel:
                end = numel
            copy = tensors[which, 4]
            step_size = rate / self.bias_correction(step * log_beta1)
            inverse_root = cute.math.rsqrt(self.bias_correction(step * log_beta2))
            decay = Float32(1) - rate * weight_decay
            for i in cutlass.range_constexpr(CHUNK // (self.threads * WIDTH)):
                first = begin + Int64((i * self.threads + t) * WIDTH)
                if first < end:
                    weight_at = self.elements(tensors[which, 0], Float32, first)
                    gradient_at = self.elements(tensors[which, 1], self.gradients, first)
                    average_at = self.elements(tensors[which, 2], Float32, first)
                    square_at = self.elements(tensors[which, 3], Float32, first)
                    weight = cute.make_rmem_tensor((WIDTH,), Float32)
                    gradient = cute.make_rmem_tensor((WIDTH,), self.gradients)
                    average = cute.make_rmem_tensor((WIDTH,), Float32)
                    square = cute.make_rmem_tensor((WIDTH,), Float32)
                    whole = first + Int64(WIDTH) <= end
                    if whole:
                        cute.autovec_copy(weight_at, weight)
                        cute.autovec_copy(gradient_at, gradient)
                        cute.autovec_copy(average_at, average)
                        cute.autovec_copy(square_at, square)
                    else:
                        weight.fill(0.0)
                        gradient.fill(0.0)
                        average.fill(0.0)
                        square.fill(0.0)
                        for k in cutlass.range_constexpr(WIDTH):
                            if first + Int64(k) < end:
                                weight[k] = weight_at[k]
                                gradient[k] = gradient_at[k]
                                average[k] = average_at[k]
                                square[k] = square_at[k]
                    g = gradient.load().to(Float32) * factor
                    m = average.load()
                    m = m + (g - m) * keep1
                    s = square.load()
                    s = s + (g * g - s) * keep2
                    average.store(m)
                    square.store(s)
                    root = cute.math.sqrt(s) * inverse_root + eps
                    weight.store(weight.load() * decay - m * step_size / root)
                    rounded = cute.make_rmem_tensor((WIDTH,), BFloat16)
                    rounded.store(weight.load().to(BFloat16))
                    copy_at = self.elements(copy, BFloat16, first)
                    if whole:
                        cute.autovec_copy(weight, weight_at)
                        cute.autovec_copy(average, average_at)
                        cute.autovec_copy(square, square_at)
                        if copy != Int64(0):
                            cute.autovec_copy(rounded, copy_at)
                    else:
                        for k in cutlass.range_constexpr(WIDTH):
                            if first + Int64(k) < end:
                                weight_at[k] = weight[k]
                                average_at[k] = average[k]
                                square_at[k] = square[k]
                                if copy != Int64(0):
                                    copy_at[k] = rounded[k]


def reference(weight, gradient, average, square, numbers, beta1, beta2, weight_decay, eps):
    """One tensor's new weight and moments, in float64."""
    import numpy as np

    weight, gradient, average, square = (
        np.asarray(a, np.float64) for a in (weight, gradient, average, square)
    )
    rate, step, factor, skip = (float(x) for x in numbers)
    if skip:
        return {"weight": weight, "average": average, "square": square}
    g = gradient * factor
    average = average + (g - average) * (1 - beta1)
    square = square * beta2 + g * g * (1 - beta2)
    root = np.sqrt(square) / np.sqrt(1 - beta2**step) + eps
    weight = weight * (1 - rate * weight_decay) - rate / (1 - beta1**step) * average / root
    return {"weight": weight, "average": average, "square": square}


register(
    Kernel(
        name="adamw_step",
        doc="AdamW on float32 master weights of many tensors, with their bfloat16 copies.",
        variants=VARIANTS,
        contract=contract,
        make=AdamWStep,
        reference=reference,
    )
)
