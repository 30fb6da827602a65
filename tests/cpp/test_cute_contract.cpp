// The checks made before a CuTe kernel is launched, and the choice of a variant. No GPU, no CUDA.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda/cute/select.h"

using namespace vt;
using namespace vt::cuda::cute;

namespace {

void expect(bool ok, const char* what, int line) {
  if (ok) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  std::exit(1);
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

// x (m, n) read, w (n) optional, y (m, n) written and maybe x, s (m) written float32.
constexpr ExtentRule kExtents[] = {{1, 1, 1 << 20}, {8, 8, 256}};
constexpr TensorRule kTensors[] = {
    {DType::BFloat16, 2, {0, 1}, Access::Read, 16, 8, false, 0u},
    {DType::BFloat16, 1, {1}, Access::Read, 16, 8, true, 0u},
    {DType::BFloat16, 2, {0, 1}, Access::Write, 16, 8, false, 1u},
    {DType::Float32, 1, {0}, Access::Write, 4, 8, true, 0u},
};
constexpr ExtentRule kWide[] = {{1, 1, 1 << 20}, {8, 8, 1024}};
constexpr const char* kExtentNames[] = {"m", "n"};
constexpr const char* kTensorNames[] = {"x", "w", "y", "s"};

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

struct Sample {
  std::array<int64_t, 2> extents{4, 128};
  std::array<Operand, 4> tensors{
      Operand(at(0x10000), DType::BFloat16, 128), Operand(at(0x20000), DType::BFloat16),
      Operand(at(0x30000), DType::BFloat16, 128), Operand(at(0x40000), DType::Float32)};
  Call call() const { return {extents, tensors, {}}; }
  Refusal refusal() const { return check_call(kExtents, kTensors, call()); }
  bool refuses(Reason reason, int which) const {
    const Refusal r = refusal();
    return r.reason == reason && r.which == which;
  }
  std::string why() const {
    return describe(refusal(), kExtents, kTensors, call(), kExtentNames, kTensorNames);
  }
};

template <class Change>
Sample changed(Change&& change) {
  Sample s;
  change(s);
  return s;
}

void checks() {
  EXPECT(!Sample().refusal());
  EXPECT(changed([](Sample& s) { s.extents[0] = 0; }).refuses(Reason::ExtentRange, 0));
  EXPECT(changed([](Sample& s) { s.extents[1] = 0; }).refuses(Reason::ExtentRange, 1));
  EXPECT(changed([](Sample& s) { s.extents[1] = 264; }).refuses(Reason::ExtentRange, 1));
  EXPECT(changed([](Sample& s) { s.extents[1] = 100; }).refuses(Reason::ExtentDivisor, 1));
  EXPECT(changed([](Sample& s) { s.extents[1] = 100; }).why() == "n = 100 is not a multiple of 8");
  EXPECT(changed([](Sample& s) { s.tensors[0].data = nullptr; }).refuses(Reason::Missing, 0));
  EXPECT(!changed([](Sample& s) { s.tensors[1] = {}; }).refusal());
  EXPECT(!changed([](Sample& s) { s.tensors[3] = {}; }).refusal());
  EXPECT(changed([](Sample& s) { s.tensors[1].dtype = DType::Float32; }).refuses(Reason::Dtype, 1));
  EXPECT(changed([](Sample& s) { s.tensors[1].dtype = DType::Float32; }).why() ==
         "w is float32, not bfloat16");
  EXPECT(changed([](Sample& s) { s.tensors[0].data = at(0x10008); }).refuses(Reason::Alignment, 0));
  EXPECT(!changed([](Sample& s) { s.tensors[3].data = at(0x40004); }).refusal());
  EXPECT(changed([](Sample& s) { s.tensors[3].data = at(0x40002); }).refuses(Reason::Alignment, 3));
  EXPECT(changed([](Sample& s) { s.tensors[0].strides[0] = 132; }).refuses(Reason::Stride, 0));
  EXPECT(changed([](Sample& s) { s.tensors[0].strides[0] = -128; }).refuses(Reason::Stride, 0));
}

void memory() {
  // Rows that are read may repeat, rows that are written may not.
  EXPECT(!changed([](Sample& s) { s.tensors[0].strides[0] = 0; }).refusal());
  EXPECT(changed([](Sample& s) { s.tensors[2].strides[0] = 0; }).refuses(Reason::Stride, 2));
  EXPECT(changed([](Sample& s) { s.tensors[2].strides[0] = 120; }).refuses(Reason::Stride, 2));
  EXPECT(!changed([](Sample& s) {
            s.extents[0] = 1;
            s.tensors[2].strides[0] = 0;
          }).refusal());
  // In place, but only exactly so.
  EXPECT(!changed([](Sample& s) { s.tensors[2].data = s.tensors[0].data; }).refusal());
  EXPECT(changed([](Sample& s) {
           s.tensors[2].data = s.tensors[0].data;
           s.tensors[2].strides[0] = 256;
         }).refuses(Reason::Overlap, 2));
  EXPECT(changed([](Sample& s) { s.tensors[2].data = at(0x10010); }).refuses(Reason::Overlap, 2));
  EXPECT(changed([](Sample& s) {
           s.tensors[2].data = s.tensors[1].data;
         }).refuses(Reason::Overlap, 2));
  EXPECT(changed([](Sample& s) {
           s.tensors[3].data = at(0x10000 + 4 * 256 - 4);
         }).refuses(Reason::Overlap, 3));
  EXPECT(!changed([](Sample& s) { s.tensors[3].data = at(0x10000 + 4 * 256); }).refusal());
}

int variant_of(Mode mode, int gpu, std::span<const TunedRow> tuned, const Sample& sample,
               bool first_usable = true, const ProductModel& model = {}) {
  return choose(
             mode, {gpu, 132}, tuned, model, 2,
             [&](size_t i) {
               return i == 0 ? Rules{kExtents, kTensors, first_usable}
                             : Rules{kWide, kTensors, true};
             },
             sample.call())
      .variant;
}

void choices() {
  const Sample small, wide = changed([](Sample& s) {
                        s.extents[1] = 512;
                        s.tensors[0].strides[0] = s.tensors[2].strides[0] = 512;
                      });
  const Sample odd = changed([](Sample& s) { s.extents[1] = 100; });
  // Nothing was measured: the library's.
  EXPECT(variant_of(Mode::Table, -1, {}, small) == -1);
  EXPECT(variant_of(Mode::Table, 0, {}, small) == -1);
  EXPECT(variant_of(Mode::Off, 0, {}, small) == -1);
  // Forced: the first that applies.
  EXPECT(variant_of(Mode::All, -1, {}, small) == 0);
  EXPECT(variant_of(Mode::All, -1, {}, small, false) == 1);
  EXPECT(variant_of(Mode::All, -1, {}, wide) == 1);
  EXPECT(variant_of(Mode::All, -1, {}, odd) == -1);
  // Measured.
  const TunedRow rows[] = {
      {0, 1, {{{1, 8}, {64, 128}}}},
      {0, 0, {{{1, 8}, {64, 1024}}}},
  };
  EXPECT(variant_of(Mode::Table, 0, rows, small) == 1);
  EXPECT(variant_of(Mode::Table, 1, rows, small) == -1);
  EXPECT(variant_of(Mode::Table, -1, rows, small) == -1);
  EXPECT(variant_of(Mode::Off, 0, rows, small) == -1);
  // A row whose variant does not apply is no reason to launch it.
  EXPECT(variant_of(Mode::Table, 0, rows, wide) == -1);
  EXPECT(variant_of(Mode::All, 0, rows, wide) == 1);
  EXPECT(variant_of(Mode::Table, 0, rows, changed([](Sample& s) { s.extents[0] = 9; })) == -1);

  // Where the library is the fastest for one dtype no variant is launched, unless forced.
  TunedRow first[] = {{0, -1, {{{4, 4}, {64, 64}}}, small.tensors[0].dtype}, rows[0], rows[1]};
  const Sample four = changed([](Sample& s) { s.extents[0] = 4, s.extents[1] = 64; });
  EXPECT(variant_of(Mode::Table, 0, std::span(first).subspan(1), four) == 1);
  EXPECT(variant_of(Mode::Table, 0, first, four) == -1);
  EXPECT(variant_of(Mode::Model, 0, first, four) == -1);
  EXPECT(variant_of(Mode::Table, 1, first, four) == -1);
  EXPECT(variant_of(Mode::All, 0, first, four) == 1);
  EXPECT(variant_of(Mode::Table, 0, first,
                    changed([](Sample& s) { s.extents[0] = 5, s.extents[1] = 64; })) == 1);
  first[0].dtype = DType::Float64;
  EXPECT(variant_of(Mode::Table, 0, first, four) == 1);

  EXPECT(mode_from("") == Mode::Table);
  // Without a model there are its rows alone.
  EXPECT(variant_of(Mode::Model, 0, rows, small) == 1);
  EXPECT(variant_of(Mode::Model, 1, rows, small) == -1);
  EXPECT(mode_from("model") == Mode::Model);
  EXPECT(mode_from("all") == Mode::All);
  EXPECT(mode_from("off") == Mode::Off);
  EXPECT(!mode_from("yes"));
}

/// Products of 128x128 tiles that take what their waves take, and a library that takes twice that
/// from 4096 rows on.
void predictions() {
  constexpr MeasuredPoint points[] = {
      {{1, 8192, 1024, 1024}, 0, 10, 20}, {{1, 16384, 1024, 1024}, 0, 20, 40},
      {{1, 8192, 2048, 1024}, 0, 20, 40}, {{1, 2048, 1024, 1024}, -1, 0, 0},
      {{1, 1024, 1024, 1024}, -1, 0, 0},  {{1, 512, 1024, 1024}, -1, 0, 0}};
  constexpr Tile tiles[] = {{128, 128, 64, 1, 1}};
  const ProductModel model{points, tiles, {0, 1, 0, 0}, {0, 1, 0, 0}, 132, 0};
  const auto at = [&](int64_t l, int64_t m, int64_t n, int64_t k, double margin = 0.1) {
    return model.predict({l, m, n, k}, 132, margin);
  };
  EXPECT(at(1, 8192, 1024, 1024).variant == 0);
  EXPECT(std::abs(at(1, 8192, 1024, 1024).gain - 1) < 1e-9);
  EXPECT(at(1, 8192, 1024, 1024, 1.01).variant == -1);
  // 515 tiles take five waves where 512 take four, and as much of the library's time.
  EXPECT(at(1, 8200, 1024, 1024).variant == 0);
  EXPECT(std::abs(at(1, 8200, 1024, 1024).gain - (2. * 8200 / 8192 * 4 / 4 - 1)) < 1e-9);
  EXPECT(std::abs(at(1, 8576, 1024, 1024).gain - (2. * 8576 / 8192 * 4 / 5 - 1)) < 1e-9);
  EXPECT(at(1, 2048, 1024, 1024).variant == -1);                       // the library's are nearer
  EXPECT(at(1, 8192, 1024, 4096).variant == -1);                       // too far from all
  EXPECT(at(2, 8192, 1024, 1024).variant == -1);                       // batches were not measured
  EXPECT(model.predict({1, 8192, 1024, 1024}, 66, 0.1).variant == 0);  // half the size: both twice
  EXPECT(ProductModel{}.predict({1, 1, 1, 1}, 132, 0).variant == -1);
}

}  // namespace

int main() {
  predictions();
  checks();
  memory();
  choices();
  return 0;
}
