// The part of cuBLASLt's binary interface that is used here (cuBLAS 13). The library is opened at
// run time, so a build needs no copy of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "cuda/library.h"

namespace vt::cuda::cublaslt {

using Status = int;
using Handle = void*;
using Description = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};
enum : int { kLayoutBatchCount = 5, kLayoutBatchStep = 6 };
enum : int { kDescTransposeA = 3, kDescTransposeB = 4, kDescEpilogue = 7, kDescBias = 8 };
enum : int { kDescAux = 11, kDescAuxStep = 12 };
enum : int { kDescScaleA = 17, kDescScaleB = 18, kDescFastAccumulate = 25 };
enum : int { kPreferWorkspace = 1, kPreferReduction = 3, kPreferAlignmentA = 5 };
enum : uint32_t { kReduceInComputeType = 2 };
enum : int { kCompute32F = 68, kCompute64F = 70, kCompute32I = 72, kCompute32FTf32 = 77 };
enum : uint32_t {
  kEpilogueDefault = 1,
  kEpilogueRelu = 2,
  kEpilogueBias = 4,  // a bit that others may have beside theirs
  kEpilogueGeluAux = 32 | 128,
  kEpilogueDGelu = 64 | 128,
};
enum : int {  // of an algorithm
  kConfigId = 0,
  kConfigTile = 1,
  kConfigSplitK = 2,
  kConfigReduction = 3,
  kConfigSwizzle = 4,
  kConfigCustom = 5,
  kConfigStages = 6,
  kConfigInner = 7,
  kConfigCluster = 8,
};

struct Api {
  Library library{"cublasLt", "libcublasLt.so.13", "nvidia-cublas"};
  Status (*create)(Handle*);
  Status (*matmul)(Handle, Description, const void* alpha, const void* a, Description,
                   const void* b, Description, const void* beta, const void* c, Description,
                   void* d, Description, const Algorithm*, void* workspace, size_t, cudaStream_t);
  Status (*heuristic)(Handle, Description, Description, Description, Description, Description,
                      Description preference, int wanted, Heuristic*, int* found);
  Status (*desc_create)(Description*, int compute, int scale);
  Status (*desc_destroy)(Description);
  Status (*desc_set)(Description, int attribute, const void*, size_t);
  Status (*layout_create)(Description*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*layout_destroy)(Description);
  Status (*layout_set)(Description, int attribute, const void*, size_t);
  Status (*preference_create)(Description*);
  Status (*preference_destroy)(Description);
  Status (*preference_set)(Description, int attribute, const void*, size_t);
  const char* (*status_name)(Status);
  size_t (*version)();
  Status (*config_get)(const Algorithm*, int attribute, void*, size_t, size_t* written);

  Api();
};

const Api& api();
/// Throws where a call did not go well.
void check_status(Status status, std::string_view what);
/// The library's handle on a device, made at its first use there.
Handle handle_of(int device);

}  // namespace vt::cuda::cublaslt
