// _fused_pointwise on a GPU: a kernel made for the chain (csrc/cuda/chain.h). A thread loads pieces
// of all operands that are read before they are written, runs the ops on registers, each result
// rounded to its dtype, and stores what is written last. So an output may lie where an input lies,
// element for element.
#include <algorithm>
#include <atomic>
#include <map>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/host_wait.h"
#include "cuda/chain.h"
#include "cuda/compiled_kernels.h"
#include "cuda/graph_chains.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/nvrtc.h"

namespace vt::cuda {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 30;  // of one launch
constexpr size_t kMostKernels = 1024;                // remembered by a thread, for each device

/// The kernel, which is never unloaded. Each thread remembers those it has used: the process' own
/// list takes a lock, and the whole text with what all begin with.
cudaKernel_t kernel_of(const ChainSource& source, int device) {
  thread_local std::map<int, std::unordered_map<std::string, cudaKernel_t>> used;
  auto& known = used[device];
  if (const auto found = known.find(source.text); found != known.end()) return found->second;
  const cudaKernel_t made = compiled_kernel(chain_prelude() + source.text, source.name, device);
  if (known.size() >= kMostKernels) known.clear();
  return known.emplace(source.text, made).first->second;
}

class ChainLaunch {
 public:
  ChainLaunch(const Chain& chain, const ChainSource& source)
      : chain_(chain), launch_(chain.device), kernel_(kernel_of(source, launch_.device())) {
    std::copy(source.numbers.begin(), source.numbers.end(), arguments_.number);
    for (const ChainOperand& o : chain.operands) {
      if (o.place >= 0) arguments_.data[o.place] = o.data;
    }
  }

  /// All of the chain, in parts that 32-bit numbers can count.
  void run() {
    SmallVector<int64_t, 6> shape = chain_.shape;
    if (shape.empty()) shape.push_back(1);
    part(shape, 0);
  }

 private:
  void part(SmallVector<int64_t, 6>& shape, size_t dim) {
    int64_t inner = 1;
    for (size_t d = dim; d < shape.size(); ++d) inner *= shape[d];
    if (inner <= kMostElements) {
      issue(shape, inner);
      return;
    }
    // As many of the slowest dimension as fit; where not even one does, one by one.
    const int64_t extent = shape[dim], each = inner / extent;
    const int64_t step = std::max<int64_t>(1, kMostElements / each);
    const ChainArguments before = arguments_;
    for (int64_t at = 0; at < extent; at += step) {
      shape[dim] = std::min(step, extent - at);
      for (const ChainOperand& o : chain_.operands) {
        if (o.place >= 0)
          arguments_.data[o.place] =
              before.data[o.place] + at * (o.strides.empty() ? 0 : o.strides[dim]);
      }
      part(shape, step == 1 && each > kMostElements ? dim + 1 : dim);
    }
    shape[dim] = extent;
    arguments_ = before;
  }

  void issue(const SmallVector<int64_t, 6>& shape, int64_t n) {
    arguments_.n = static_cast<uint32_t>(n);
    if (chain_.rows) {
      size_t dims = shape.size();
      if (chain_.width > 1)
        arguments_.pieces = ChainDivisor(static_cast<uint32_t>(shape[--dims] / chain_.width));
      for (size_t d = 0; d < dims; ++d) {
        const size_t from = dims - 1 - d;  // the kernel counts from the fastest
        arguments_.extent[d] = ChainDivisor(static_cast<uint32_t>(shape[from]));
        for (const ChainOperand& o : chain_.operands) {
          if (o.place >= 0) arguments_.stride[o.place][d] = o.strides[from];
        }
      }
    }
    void* pointers[] = {&arguments_, nullptr};
    const int64_t each = int64_t{kChainBlock} * chain_.width * chain_.unroll;
    launch(kernel_, dim3(static_cast<unsigned>(ceil_div(n, each))), dim3(kChainBlock), 0, pointers,
           {launch_.stream(), launch_.device()});
  }

  const Chain& chain_;
  const Launch launch_;
  cudaKernel_t kernel_;
  ChainArguments arguments_;
};

void fused_pointwise(TensorSpan results, TensorSpan tensors, IntSpan sizes, IntSpan program,
                     std::span<const Scalar> numbers) {
  const Chain chain(results, tensors, sizes, program, numbers);
  if (chain.numel == 0) return;
  ChainLaunch(chain, chain_source(chain)).run();
}

/// Compiles what the chains of a step need, each once and several at a time. What fails here fails
/// again where the op is captured, and is told there.
void prepare(std::span<const graphs::Instruction> calls) {
  std::map<std::string, std::string> sources;  // with their kernels' names
  int device = -1;
  for (const graphs::Instruction& call : calls) {
    if (call.id != OpId::_fused_pointwise) continue;
    try {
      const Chain chain(std::get<std::vector<Tensor>>(call.args[0]),
                        std::get<std::vector<Tensor>>(call.args[1]),
                        std::get<std::vector<int64_t>>(call.args[2]),
                        std::get<std::vector<int64_t>>(call.args[3]),
                        std::get<std::vector<Scalar>>(call.args[4]));
      device = chain.device.index;
      if (chain.numel == 0) continue;
      const ChainSource source = chain_source(chain);
      sources.emplace(chain_prelude() + source.text, source.name);
    } catch (const std::exception&) {
    }
  }
  if (sources.empty()) return;
  const std::vector<std::pair<std::string, std::string>> all(sources.begin(), sources.end());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < all.size(); i = next++) {
      try {
        const DeviceGuard guard(device);
        compiled_kernel(all[i].first, all[i].second, device);
      } catch (const std::exception&) {
      }
    }
  };
  const size_t most = std::max(1u, std::thread::hardware_concurrency());
  const HostWait
      waiting;  // for the compiler, and the other threads may have to run Python to find it
  std::vector<std::jthread> others;
  for (size_t i = 1; i < std::min({all.size(), most, size_t{8}}); ++i) others.emplace_back(work);
  work();
}

const RegisterCuda registered([](KernelTable& t) {
  t._fused_pointwise = fused_pointwise;
  set_chain_compiler({prepare, compiler_problem});
});

}  // namespace
}  // namespace vt::cuda
