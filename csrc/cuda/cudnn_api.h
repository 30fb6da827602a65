// The part of cuDNN's backend interface (version 9) that is used here. The library is opened at run
// time, so a build needs no copy of it. A computation is described by descriptors: objects with
// numbered attributes, which are final once finalized.
#pragma once

#include <driver_types.h>

#include <cstdint>
#include <string_view>
#include <utility>

#include "cuda/library.h"

namespace vt::cuda::cudnn {

using Status = int;
using Handle = void*;
using RawDescriptor = void*;

enum class DataType : int {
  Float = 0,
  Double = 1,
  Half = 2,
  Int32 = 4,
  BFloat16 = 9,
  Boolean = 11
};

/// How the values of an attribute are stored.
enum class ValueType : int {
  Handle = 0,
  DataType = 1,
  Boolean = 2,
  Int64 = 3,
  Float = 4,
  Double = 5,
  Pointer = 6,
  ConvolutionMode = 7,
  HeuristicMode = 8,
  NumericalNote = 11,
  PointwiseMode = 14,
  Descriptor = 15,
  ReductionOperator = 18,
};

enum class DescriptorType : int {
  Pointwise = 0,
  Convolution = 1,
  Engine = 2,
  EngineConfig = 3,
  Heuristics = 4,
  ExecutionPlan = 5,
  ConvolutionForward = 10,
  ConvolutionBackwardFilter = 11,
  ConvolutionBackwardData = 12,
  OperationPointwise = 13,
  OperationGraph = 15,
  VariantPack = 16,
  Tensor = 17,
  Matmul = 18,
  OperationMatmul = 19,
  Reduction = 21,
  OperationReduction = 22,
  OperationReshape = 31,
};

enum class Attribute : int {
  PointwiseMode = 0,
  PointwisePrecision = 1,
  PointwiseAxis = 9,
  ConvolutionType = 100,
  ConvolutionMode = 101,
  ConvolutionDilations = 102,
  ConvolutionStrides = 103,
  ConvolutionPaddingAfter = 104,
  ConvolutionPaddingBefore = 105,
  ConvolutionRank = 106,
  HeuristicsMode = 200,
  HeuristicsGraph = 201,
  HeuristicsResults = 202,
  EngineConfigEngine = 300,
  PlanHandle = 400,
  PlanEngineConfig = 401,
  PlanWorkspace = 402,
  ForwardAlpha = 700,
  ForwardBeta = 701,
  ForwardConvolution = 702,
  ForwardW = 703,
  ForwardX = 704,
  ForwardY = 705,
  DataAlpha = 706,
  DataBeta = 707,
  DataConvolution = 708,
  DataW = 709,
  DataDx = 710,
  DataDy = 711,
  FilterAlpha = 712,
  FilterBeta = 713,
  FilterConvolution = 714,
  FilterDw = 715,
  FilterX = 716,
  FilterDy = 717,
  PointwiseDescriptor = 750,
  PointwiseX = 751,
  PointwiseB = 752,
  PointwiseY = 753,
  PointwiseT = 758,
  GraphHandle = 800,
  GraphOperations = 801,
  TensorAlignment = 900,
  TensorType = 901,
  TensorSizes = 902,
  TensorStrides = 903,
  TensorId = 906,
  TensorIsVirtual = 907,
  TensorIsByValue = 908,
  PackIds = 1000,
  PackPointers = 1001,
  PackWorkspace = 1003,
  EngineNumericalNote = 1303,
  MatmulType = 1500,
  MatmulA = 1520,
  MatmulB = 1521,
  MatmulC = 1522,
  MatmulDescriptor = 1523,
  ReductionOperator = 1600,
  ReductionType = 1601,
  ReductionX = 1610,
  ReductionY = 1611,
  ReductionDescriptor = 1612,
  ReshapeX = 2200,
  ReshapeY = 2201,
};

enum class Pointwise : int {
  Add = 0,
  Mul = 1,
  Div = 6,
  Sub = 9,
  Exp = 13,
  Log = 15,
  Identity = 21,
  GreaterEqual = 303,
  Index = 501,   // the element's place along an axis
  Select = 601,  // t ? x : b
};
enum class Reduction : int { Add = 0, Max = 3 };
enum class Heuristic : int { Fallback = 2, A = 3 };
enum class Note : int {
  TensorCore = 0,
  DownConvertInputs = 1,
  NonDeterministic = 4,
};
inline constexpr int kNotes = 32;  // room for more than any version has
inline constexpr int kCrossCorrelation = 1;

struct Api {
  Library library{"cudnn", "libcudnn.so.9", "nvidia-cudnn-cu13"};
  size_t (*version)();
  Status (*create)(Handle*);
  Status (*set_stream)(Handle, cudaStream_t);
  const char* (*error_string)(Status);
  void (*last_error)(char*, size_t);
  Status (*create_descriptor)(DescriptorType, RawDescriptor*);
  Status (*destroy_descriptor)(RawDescriptor);
  Status (*finalize)(RawDescriptor);
  Status (*set)(RawDescriptor, Attribute, ValueType, int64_t count, const void* values);
  Status (*get)(RawDescriptor, Attribute, ValueType, int64_t wanted, int64_t* count, void* values);
  Status (*execute)(Handle, RawDescriptor plan, RawDescriptor variant_pack);

  Api() {
    library.bind(version, "cudnnGetVersion");
    library.bind(create, "cudnnCreate");
    library.bind(set_stream, "cudnnSetStream");
    library.bind(error_string, "cudnnGetErrorString");
    library.bind(last_error, "cudnnGetLastErrorString");
    library.bind(create_descriptor, "cudnnBackendCreateDescriptor");
    library.bind(destroy_descriptor, "cudnnBackendDestroyDescriptor");
    library.bind(finalize, "cudnnBackendFinalize");
    library.bind(set, "cudnnBackendSetAttribute");
    library.bind(get, "cudnnBackendGetAttribute");
    library.bind(execute, "cudnnBackendExecute");
  }
};

/// Opened at the first call; throws where it cannot be.
const Api& api();
/// Throws unless `status` is success; the error carries what the library says of it.
void check_status(Status status, std::string_view what);

/// Owns one of the library's descriptors.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(DescriptorType type) {
    check_status(api().create_descriptor(type, &raw_), "creating a descriptor");
  }
  Descriptor(Descriptor&& other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(raw_, other.raw_);
    return *this;
  }
  ~Descriptor() {
    if (raw_) api().destroy_descriptor(raw_);
  }

  RawDescriptor raw() const { return raw_; }
  Status set(Attribute attribute, ValueType type, int64_t count, const void* values) {
    return api().set(raw_, attribute, type, count, values);
  }
  Status finalize() { return api().finalize(raw_); }

 private:
  RawDescriptor raw_ = nullptr;
};

}  // namespace vt::cuda::cudnn
