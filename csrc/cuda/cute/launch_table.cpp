#include "cuda/cute/launch_table.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda/cute/late_code.h"
#include "cuda/device.h"
#include "cuda/kernel_log.h"
#include "cuda/relaxed_capture.h"
#include "cuda/stream.h"
#include "cuda/sync.h"

namespace vt::cuda::cute {
namespace {

Mode from_environment() {
  const char* text = std::getenv("VT_CUTE_KERNELS");
  const auto mode = mode_from(text ? text : "");
  if (!mode)
    fail(ErrorKind::Value, "VT_CUTE_KERNELS must be off, table, model or all, got '", text, "'");
  return *mode;
}

std::atomic<Mode>& current() {
  static std::atomic<Mode> value{from_environment()};
  return value;
}

/// The index of a GPU among those measured; -1 for others.
int gpu_index(std::string_view name) {
  const auto gpus = tuned_gpus();
  for (size_t i = 0; i < gpus.size(); ++i) {
    if (name == gpus[i]) return static_cast<int>(i);
  }
  return -1;
}

int gpu_of(int device) {
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet, else the index + 2
  std::atomic<int>& slot = known[device];
  int value = slot.load(std::memory_order_relaxed);
  if (value == 0) {
    value = gpu_index(properties(device).name) + 2;
    slot.store(value, std::memory_order_relaxed);
  }
  return value - 2;
}

size_t index_of(const Kernel& kernel) { return static_cast<size_t>(&kernel - kernels().data()); }

Choice choose_of(const Kernel& kernel, const Call& call, const Gpu& gpu) {
  return choose(
      mode(), gpu, kernel.tuned, kernel.model, kernel.variants.size(),
      [&](size_t i) {
        const Variant& v = kernel.variants[i];
        return Rules{v.extents, v.tensors, v.enter || late_usable(index_of(kernel), i)};
      },
      call);
}

std::string explain(const Kernel& kernel, Refusal refusal, size_t variant, const Call& call) {
  const Variant& v = kernel.variants[variant];
  return describe(refusal, v.extents, v.tensors, call, kernel.extent_names, kernel.tensor_names);
}

/// The choice of a variant that has code: compiled now if need be, and in `late` if it is not this
/// library's. One that cannot be compiled is not usable any more, and another is chosen.
Choice settled(const Kernel& kernel, const Call& call, const Gpu& gpu, LateCode*& late) {
  for (;;) {
    const Choice choice = choose_of(kernel, call, gpu);
    if (choice.variant < 0) return choice;
    const auto variant = static_cast<size_t>(choice.variant);
    if (kernel.variants[variant].enter) return choice;
    late = late_code(index_of(kernel), variant);
    if (late) return choice;
  }
}

/// Each decision is told once.
void tell(const Kernel& kernel, const Call& call, const Choice& choice,
          std::string_view otherwise) {
  std::string line = str("vibetensor: ", kernel.name);
  for (size_t i = 0; i < call.extents.size(); ++i)
    append(line, str(i ? ", " : " ", kernel.extent_names[i], "=", call.extents[i]));
  if (choice.variant >= 0) {
    append(line, str(": CuTe ", kernel.variants[static_cast<size_t>(choice.variant)].name,
                     mode() == Mode::All ? " (VT_CUTE_KERNELS=all)"
                     : choice.predicted > 0
                         ? str(" (by the model, ", std::lround(choice.predicted * 100), "% faster)")
                         : " (measured)"));
  } else {
    append(line, ": the library's kernel, ");
    if (!otherwise.empty())
      append(line, otherwise);
    else if (choice.library)
      append(line, "which was measured to be faster");
    else if (choice.refused >= 0)
      append(line, str(kernel.variants[static_cast<size_t>(choice.refused)].name, ": ",
                       explain(kernel, choice.refusal, static_cast<size_t>(choice.refused), call)));
    else
      append(line, mode() == Mode::Off     ? "VT_CUTE_KERNELS=off"
                   : mode() == Mode::Model ? "no measured choice covers it, nor does the model"
                                           : "no measured choice covers it");
  }
  log_kernel(line);
}

/// What launches a variant: compiled in, or made late.
struct Code {
  const Variant& variant;
  LateCode* late = nullptr;

  bool ready(int device) const {
    return late ? late->module.ready(device, late->code.init, late->code.load, variant.name)
                : variant.module->ready(device, variant.init, variant.load, variant.name);
  }
  int32_t enter(const Kernel& kernel, const Call& call, cudaStream_t stream) const {
    return late ? enter_packed(late->code.entry, variant.tensors, kernel.scalar_types, call, stream)
                : variant.enter(call, stream);
  }
};

void enter(const Kernel& kernel, const Code& code, const Call& call, const Launch& on) {
  const auto error = static_cast<cudaError_t>(code.enter(kernel, call, on.stream()));
  if (error != cudaSuccess) [[unlikely]]
    check_cuda(error, str("launching the CuTe kernel ", kernel.name, " ", code.variant.name));
  wait_if_blocking(on.stream());
}

}  // namespace

bool runs_on(int major, int minor) { return major == 9 && minor == 0; }

bool Module::ready(int device, Step init, Step load, const char* name) {
  const uint64_t bit = uint64_t{1} << device;
  if (ready_.load(std::memory_order_acquire) & bit) [[likely]]
    return true;
  if (failed_.load(std::memory_order_relaxed) & bit) return false;
  const std::lock_guard lock(mutex_);
  if (ready_.load(std::memory_order_relaxed) & bit) return true;
  if (!broken_ && bring(device, init, load, name)) {
    ready_.fetch_or(bit, std::memory_order_release);
    return true;
  }
  failed_.fetch_or(bit, std::memory_order_relaxed);
  return false;
}

cudaError_t Module::run(int device, Step init, Step load) {
  // The exported header's structures: addresses of the arguments, results last.
  cudaLibrary_t* library = &library_;
  cudaError_t error = cudaSuccess;
  const RelaxedCapture relaxed;  // this thread may be capturing
  if (!initialised_) {
    void* arguments[] = {&library, &error};
    init(arguments);
    initialised_ = error == cudaSuccess;
    broken_ = !initialised_;
  }
  int32_t number = device;
  if (error == cudaSuccess) {
    void* arguments[] = {&library, &number, &error};
    load(arguments);
  }
  return error;
}

bool Module::bring(int device, Step init, Step load, const char* name) {
  const cudaError_t error = run(device, init, load);
  if (error == cudaSuccess) return true;
  (void)cudaGetLastError();  // the caller goes on without this kernel
  std::fprintf(stderr, "vibetensor: the CuTe kernel %s cannot be loaded on device %d: %s\n", name,
               device, cudaGetErrorString(error));
  return false;
}

Mode mode() { return current().load(std::memory_order_relaxed); }
void set_mode(Mode value) { current().store(value, std::memory_order_relaxed); }

bool considered(int kernel) {
  if (kernel_log()) [[unlikely]]
    return true;
  const Mode now = mode();
  if (now == Mode::Off || !(*compiled_by() || compiles_late())) return false;
  return now == Mode::All || !kernels()[static_cast<size_t>(kernel)].tuned.empty();
}

Choice chosen(const Kernel& kernel, const Call& call, std::string_view gpu, int major, int minor,
              int multiprocessors) {
  if (!runs_on(major, minor)) return {};
  LateCode* late = nullptr;
  return settled(kernel, call, {gpu_index(gpu), multiprocessors}, late);
}

bool launch(int index, const Call& call, const Launch& on) {
  const Kernel& kernel = kernels()[static_cast<size_t>(index)];
  const int device = on.device();
  const DeviceProperties& gpu = on.properties();
  Choice choice;
  LateCode* late = nullptr;
  std::string_view otherwise;
  if (!*compiled_by() && !compiles_late()) {
    otherwise = "no CuTe kernels were compiled into this library";
  } else if (!runs_on(gpu.major, gpu.minor)) {
    otherwise = "CuTe kernels are compiled for compute capability 9.0 only";
  } else {
    choice = settled(kernel, call, {gpu_of(device), gpu.multiprocessors}, late);
    if (choice.variant >= 0) {
      const Code code{kernel.variants[static_cast<size_t>(choice.variant)], late};
      if (!code.ready(device)) {
        choice = {};
        otherwise = "the CuTe kernel's code could not be loaded";
      }
    }
  }
  if (kernel_log()) [[unlikely]]
    tell(kernel, call, choice, otherwise);
  if (choice.variant < 0) return false;
  enter(kernel, {kernel.variants[static_cast<size_t>(choice.variant)], late}, call, on);
  return true;
}

void launch_variant(const Kernel& kernel, size_t index, const Call& call, const Launch& on) {
  const Variant& v = kernel.variants[index];
  const Refusal refusal =
      v.enter ? check_call(v.extents, v.tensors, call) : Refusal{Reason::NotCompiled, -1};
  if (refusal)
    fail(ErrorKind::Value, kernel.name, " ", v.name, ": ", explain(kernel, refusal, index, call));
  check(runs_on(on.properties().major, on.properties().minor), kernel.name, " ", v.name,
        " is compiled for compute capability 9.0, device ", on.device(), " has ",
        on.properties().major, ".", on.properties().minor);
  check(v.module->ready(on.device(), v.init, v.load, v.name), kernel.name, " ", v.name,
        " could not be loaded on device ", on.device());
  enter(kernel, {v}, call, on);
}

}  // namespace vt::cuda::cute
