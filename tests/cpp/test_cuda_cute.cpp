// Launches of CuTe kernels on a runtime without a device: code that is linked in, code that comes
// late, and kernels from a library of their own; which of them a call gets, and with what
// arguments.
#include <cstring>

#include "cuda/cute/late_code.h"
#include "stub_cuda_runtime.h"
#include "test_cuda_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::cute;
using namespace vt::cuda::testing;

constexpr Device kCuda{DeviceType::CUDA, 0};

/// What the code below was called with.
struct Entered {
  std::string by;
  void *x = nullptr, *y = nullptr;
  int32_t n = 0;
  float scale = 0;
  void* stream = nullptr;
} entered;
int32_t answer = 0;  // of the code: the launch's error
int inits = 0, loads = 0;

void init(void** arguments) {
  ++inits;
  *static_cast<cudaError_t*>(arguments[1]) = cudaSuccess;
}
void load(void** arguments) {
  ++loads;
  *static_cast<cudaError_t*>(arguments[2]) = cudaSuccess;
}
void broken_init(void** arguments) {
  *static_cast<cudaError_t*>(arguments[1]) = cudaErrorInvalidKernelImage;
}

template <class T>
T read(const void* from, size_t at = 0) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(from) + at, sizeof value);
  return value;
}
/// As the DSL exports a function of two vectors and a number.
void exported(void** arguments, int32_t count) {
  CHECK(count == 5);
  entered = {"exported",
             read<void*>(arguments[0]),
             read<void*>(arguments[1]),
             read<int32_t>(arguments[0], sizeof(void*)),
             read<float>(arguments[2]),
             read<void*>(arguments[3])};
  std::memcpy(arguments[4], &answer, sizeof answer);
}
/// As the generated table calls one that is linked in.
int32_t linked(const Call& call, cudaStream_t stream) {
  entered = {"linked",
             call.tensors[0].data,
             call.tensors[1].data,
             static_cast<int32_t>(call.extents[0]),
             call.scalars[0].f32,
             stream};
  return answer;
}

constexpr ExtentRule kTiny[] = {{8, 1, 16}}, kSmall[] = {{8, 1, 64}}, kLarge[] = {{8, 1, 1024}};
constexpr TensorRule kVectors[] = {{DType::Float32, 1, {0}, Access::Read, 16, 8, false, 0u},
                                   {DType::Float32, 1, {0}, Access::Write, 16, 8, false, 0u}};
constexpr const char *kExtents[] = {"n"}, *kTensors[] = {"x", "y"}, *kScalars[] = {"scale"};
constexpr ScalarType kTypes[] = {ScalarType::f32};
Module module_large;
const Variant kVariants[] = {{"tiny", kTiny, kVectors, nullptr, nullptr, nullptr, nullptr},
                             {"small", kSmall, kVectors, nullptr, nullptr, nullptr, nullptr},
                             {"large", kLarge, kVectors, linked, init, load, &module_large}};
const Kernel kTable[] = {{"scale", kExtents, kTensors, kScalars, kTypes, kVariants, {}, {}}};
const char* const kGpus[] = {"another"};

struct Sample {
  std::array<int64_t, 1> extents;
  std::array<Operand, 2> tensors{Operand(reinterpret_cast<void*>(0x1000), DType::Float32),
                                 Operand(reinterpret_cast<void*>(0x9000), DType::Float32)};
  std::array<cute::Scalar, 1> scalars{cute::Scalar{.f32 = 2.5f}};
  explicit Sample(int64_t n) : extents{n} {}
  Call call() const { return {extents, tensors, scalars}; }
};

/// What launched a call of n elements; "" if nothing did.
std::string launched(int64_t n) {
  entered = {};
  const Launch on(kCuda);
  const bool done = launch(0, Sample(n).call(), on);
  CHECK(done == !entered.by.empty());
  if (done) {
    CHECK(entered.x == reinterpret_cast<void*>(0x1000) && entered.scale == 2.5f);
    CHECK(entered.y == reinterpret_cast<void*>(0x9000) && entered.n == n);
    CHECK(entered.stream == on.stream());
  }
  return entered.by;
}

void code_that_comes_late() {
  set_mode(Mode::All);
  CHECK(considered(0) && !compiles_late());
  CHECK(launched(8) == "linked" && launched(32) == "linked" && launched(2048).empty());
  CHECK(inits == 1 && loads == 1);

  std::vector<std::string> asked;
  set_compiler([&](const char* kernel, const char* variant) -> std::optional<OpenedCode> {
    asked.push_back(str(kernel, " ", variant));
    if (std::string_view(variant) == "tiny") return std::nullopt;
    return OpenedCode{exported, init, load};
  });
  // While calls are handed over to a graph nothing is compiled.
  vt::cuda::detail::capturing = true;
  CHECK(launched(32) == "linked" && asked.empty());
  CHECK(chosen(kTable[0], Sample(32).call(), "", 9, 0, 132).variant == 2 && asked.empty());
  vt::cuda::detail::capturing = false;
  // Who asks beforehand has it compiled.
  CHECK(chosen(kTable[0], Sample(32).call(), "", 9, 0, 132).variant == 1 && asked.size() == 1);
  CHECK(chosen(kTable[0], Sample(32).call(), "", 8, 0, 132).variant == -1);
  CHECK(launched(32) == "exported" && asked == std::vector<std::string>{"scale small"});
  CHECK(inits == 2 && loads == 2);
  // One that cannot be compiled is asked for once; the next that applies is taken.
  CHECK(launched(8) == "exported" && asked.back() == "scale tiny");
  CHECK(launched(8) == "exported" && launched(32) == "exported" && asked.size() == 2);
  CHECK(launched(72) == "linked");
  vt::cuda::detail::capturing = true;
  CHECK(launched(32) == "exported");  // it is there by now
  vt::cuda::detail::capturing = false;
  CHECK(inits == 2 && loads == 2);

  answer = cudaErrorInvalidValue;
  const auto [kind, message] = error_of([] { launched(32); });
  answer = 0;
  CHECK(contains(message, "launching the CuTe kernel scale small"));

  set_mode(Mode::Table);
  CHECK(!considered(0) && launched(32).empty());  // nothing was measured
  set_mode(Mode::Model);
  CHECK(launched(32).empty());
  set_mode(Mode::Off);
  CHECK(launched(32).empty());
  set_compiler(nullptr);
  set_mode(Mode::All);
  CHECK(launched(32) == "linked");
}

void kernels_of_their_own() {
  LoadedKernel kernel("own::scale", {"n"}, {"x", "y"}, {ScalarType::f32});
  const Launch on(kCuda);
  std::string why;
  CHECK(!kernel.launch(Sample(32).call(), on, why) && why == "nothing was compiled");
  const std::vector<TensorRule> tensors(std::begin(kVectors), std::end(kVectors));
  kernel.add("broken", {kTiny[0]}, tensors, {exported, broken_init, load});
  kernel.add("small", {kSmall[0]}, tensors, {exported, init, load});
  entered = {};
  // Code that does not load is passed by, as what does not fit is.
  for (const int64_t n : {8, 32}) {
    const char* variant = kernel.launch(Sample(n).call(), on, why);
    CHECK(variant && std::string_view(variant) == "small");
    CHECK(entered.by == "exported" && entered.n == n && entered.scale == 2.5f);
  }
  CHECK(!kernel.launch(Sample(72).call(), on, why));
  CHECK(why == "small: n = 72 is not from 1 to 64");
  Sample shifted(32);
  shifted.tensors[1].data = reinterpret_cast<void*>(0x9004);
  CHECK(!kernel.launch(shifted.call(), on, why));
  CHECK(why == "small: y is not aligned to 16 bytes");
  answer = cudaErrorInvalidValue;
  CHECK(contains(error_of([&] { kernel.launch(Sample(32).call(), on, why); }).second,
                 "launching the CuTe kernel own::scale small"));
  answer = 0;
  // Rules that are not the kernel's.
  const OpenedCode code{exported, init, load};
  CHECK(contains(error_of([&] { kernel.add("x", {}, tensors, code); }).second,
                 "a rule is wanted for each of 1 extents and 2 tensors"));
  std::vector<TensorRule> wide = tensors;
  wide[0].extents[0] = 1;
  CHECK(contains(error_of([&] { kernel.add("x", {kSmall[0]}, wide, code); }).second,
                 "a tensor's dimension has no extent"));
  CHECK(contains(error_of([] {
                   LoadedKernel("many", {}, std::vector<std::string>(kMaxTensors + 1, "t"), {});
                 }).second,
                 "at most 8 extents, 16 tensors and 16 numbers, not 0, 17 and 0"));
}

void libraries_that_are_none() {
  CHECK(contains(error_of([] { open_code("/no/such.so", "a", "b", "c"); }).second,
                 "the CuTe objects of /no/such.so cannot be loaded"));
  const auto [kind, message] =
      error_of([] { open_code("libc.so.6", "printf", "nothing_there", "c"); });
  CHECK(kind == ErrorKind::Value &&
        message == "libc.so.6 does not hold nothing_there: build it again");
}

}  // namespace

namespace vt::cuda::cute {
std::span<const Kernel> kernels() { return kTable; }
std::span<const char* const> tuned_gpus() { return kGpus; }
const char* compiled_by() { return "a test"; }
}  // namespace vt::cuda::cute

int main() {
  code_that_comes_late();
  kernels_of_their_own();
  libraries_that_are_none();
  return finish("test_cuda_cute");
}
