// What Hopper's kernels are made of, one instruction each: barriers in shared memory, copies by the
// tensor memory accelerator (TMA), and products of a warpgroup (wgmma).
//
// A tile is rows of 64 16-bit floats, 128 bytes apart, from a multiple of 1024 bytes on; the
// 16-byte pieces of row r are exchanged by r % 8 ("128-byte swizzle"). A product takes a tile as
// rows of its outer dimension, or, transposed, as rows of the dimension that it sums over. Source:
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier", "cp.async.bulk".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VT_HOPPER_CODE 1
#else
#define VT_HOPPER_CODE 0
#endif

namespace vt::cuda::hopper {

inline constexpr int kWarpgroup = 128;

// Barriers: `arrivals` and the bytes expected of copies complete a phase; phases have parity 0, 1,
// 0...

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Makes the barriers known to copies; a barrier of the block has to follow.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// An arrival once all copies (cp.async) that the thread has started have come.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// Waits for so many threads, of whole warps, at the block's barrier of that number (0 is
/// __syncthreads).
template <int kNumber, int kThreads>
__device__ inline void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}
/// What this thread wrote to shared memory can be read by copies and products afterwards.
__device__ inline void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Copies a box of a (batch, head, row, column) operand, column 0 first.
__device__ inline void copy_tile(uint32_t to, const CUtensorMap* map, int row, int head, int batch,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(0), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}
/// The same of what is used once: the L2 cache gives its place to others first.
__device__ inline void copy_tile_once(uint32_t to, const CUtensorMap* map, int row, int head,
                                      int batch, uint32_t barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(0), "r"(row), "r"(head), "r"(batch), "r"(barrier), "l"(policy)
      : "memory");
}
/// Copies adjacent bytes, a multiple of 16.
__device__ inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

template <int kRegisters>
__device__ inline void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Products. Sums of 64 x 64: thread t of a warpgroup has, of row 16 (t / 32) + t % 32 / 4 and of
// the row 8 further, columns 8 n + 2 (t % 4) and the next, as sums[n][0..1] and sums[n][2..3].

using Sums = float[8][4];

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Sums of finished products are not used before this place, nor changed after it.
__device__ inline void pin(Sums& sums) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[n][e])::"memory");
  }
}

/// A left operand in registers is complete before this place.
__device__ inline void pin(uint32_t (&left)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(left[k][e])::"memory");
  }
}

/// A tile as the operand of a product.
__device__ inline uint64_t tile_operand(uint32_t address) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightRows << 32 | kEightRows << 16 | (address & 0x3ffff) >> 4;
}
inline constexpr uint64_t kColumns16 = 32 >> 4;  // from an operand to 16 columns further
inline constexpr uint64_t kRows16 = 2048 >> 4;   // and to 16 rows further

#define VT_SUMS                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define VT_ROW_OF_SUMS(how, d, n) how(d[n][0]), how(d[n][1]), how(d[n][2]), how(d[n][3])
#define VT_ALL_SUMS(how, d)                                                            \
  VT_ROW_OF_SUMS(how, d, 0), VT_ROW_OF_SUMS(how, d, 1), VT_ROW_OF_SUMS(how, d, 2),     \
      VT_ROW_OF_SUMS(how, d, 3), VT_ROW_OF_SUMS(how, d, 4), VT_ROW_OF_SUMS(how, d, 5), \
      VT_ROW_OF_SUMS(how, d, 6), VT_ROW_OF_SUMS(how, d, 7)
#define VT_PRODUCT_RS(type, how, adds)                                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " adds                            \
               ", 0;\n"                                                                \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " VT_SUMS \
               ", {%32, %33, %34, %35}, %36, add, 1, 1, %37;\n}"                       \
               : VT_ALL_SUMS(how, d)                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kByRows))
#define VT_PRODUCT_SS(type, how, adds)                                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " adds                            \
               ", 0;\n"                                                                \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " VT_SUMS \
               ", %32, %33, add, 1, 1, %34, %35;\n}"                                   \
               : VT_ALL_SUMS(how, d)                                                   \
               : "l"(a), "l"(b), "n"(kLeftByRows), "n"(kByRows))

// Whether a product adds is known when the code is compiled: what it replaces is then no operand,
// and registers may have held something else while products before it ran.

/// d = a b, or d += a b: 64 x 16 times 16 x 64. a is in registers, as mma.cuh has it. b is a tile
/// whose rows are columns of the product, or (kByRows 1) rows of the sum.
template <class S, int kByRows>
__device__ __forceinline__ void product(Sums& d, const uint32_t (&a)[4], uint64_t b, bool add) {
#if VT_HOPPER_CODE
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    if (add)
      VT_PRODUCT_RS("bf16", "+f", "1");
    else
      VT_PRODUCT_RS("bf16", "=f", "0");
  } else {
    if (add)
      VT_PRODUCT_RS("f16", "+f", "1");
    else
      VT_PRODUCT_RS("f16", "=f", "0");
  }
#endif
}
/// The same of two tiles.
template <class S, int kLeftByRows, int kByRows>
__device__ __forceinline__ void product(Sums& d, uint64_t a, uint64_t b, bool add) {
#if VT_HOPPER_CODE
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    if (add)
      VT_PRODUCT_SS("bf16", "+f", "1");
    else
      VT_PRODUCT_SS("bf16", "=f", "0");
  } else {
    if (add)
      VT_PRODUCT_SS("f16", "+f", "1");
    else
      VT_PRODUCT_SS("f16", "=f", "0");
  }
#endif
}

#undef VT_PRODUCT_SS
#undef VT_PRODUCT_RS
#undef VT_ALL_SUMS
#undef VT_ROW_OF_SUMS
#undef VT_SUMS

}  // namespace vt::cuda::hopper
