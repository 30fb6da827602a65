// A library with the functions of cuBLASLt that the backend calls. It computes nothing.
#include "fake_cublaslt.h"

#include <algorithm>
#include <cstring>

namespace {

/// As the library lays out what it offers.
struct Offered {
  int64_t place;  // the algorithm, which nobody else can read
  char rest[56];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Offered) == 96);

FakeCublasLt state;

int next() { return ++state.calls == state.fail_at ? 14 : 0; }
int create(void** made) {
  if (const int status = next()) return status;
  ++state.descriptions;
  *made = new int;
  return 0;
}
int destroy(void* made) {
  --state.descriptions;
  delete static_cast<int*>(made);
  return 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

FakeCublasLt* fake_cublaslt() { return &state; }

int cublasLtCreate(void** made) {
  if (const int status = next()) return status;
  static int handle;
  ++state.handles;
  return *made = &handle, 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*,
                   const void*, void*, void*, void*, const void* algorithm, void* workspace,
                   size_t bytes, void*) {
  if (const int status = next()) return status;
  state.last_algorithm = *static_cast<const int64_t*>(algorithm);
  state.last_workspace = workspace;
  state.last_bytes = bytes;
  if (state.on_product) state.on_product();
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int wanted,
                                   void* results, int* found) {
  if (const int status = next()) return status;
  ++state.asked;
  state.most_wanted = std::max(state.most_wanted, wanted);
  auto* const out = static_cast<Offered*>(results);
  *found = 0;
  if (state.answers.empty()) {
    out[0] = {.place = -1, .workspace = state.workspace};
    return *found = 1, 0;
  }
  for (size_t i = 0; i < state.answers.size() && *found < wanted; ++i) {
    const FakeAnswer& answer = state.answers[i];
    const uint32_t reduction = answer.configuration[3];
    const bool allowed =
        answer.workspace <= state.allowed_workspace && (reduction & ~state.allowed_reductions) == 0;
    if (!allowed && !state.ignores_limits) continue;
    out[(*found)++] = {
        .place = static_cast<int64_t>(i), .workspace = answer.workspace, .state = answer.state};
  }
  return *found ? 0 : 15;
}
int cublasLtMatmulAlgoConfigGetAttribute(const void* algorithm, int attribute, void* value,
                                         size_t bytes, size_t* written) {
  const int64_t place = *static_cast<const int64_t*>(algorithm);
  if (attribute < 0 || attribute > 8 || place < 0) return 7;
  const size_t size = attribute >= 7 ? 2 : 4;
  const FakeAnswer& answer = state.answers[static_cast<size_t>(place)];
  if (bytes != size || attribute == answer.untold) return 7;
  std::memcpy(value, &answer.configuration[attribute], size);
  return *written = size, 0;
}
int cublasLtMatmulDescCreate(void** made, int, int) { return create(made); }
int cublasLtMatmulDescDestroy(void* made) { return destroy(made); }
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return next(); }
int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) {
  return create(made);
}
int cublasLtMatrixLayoutDestroy(void* made) { return destroy(made); }
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return next(); }
int cublasLtMatmulPreferenceCreate(void** made) {
  state.allowed_workspace = 0;
  state.allowed_reductions = ~0u;
  return create(made);
}
int cublasLtMatmulPreferenceDestroy(void* made) { return destroy(made); }
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void* value, size_t bytes) {
  if (const int status = next()) return status;
  if (attribute == 1) std::memcpy(&state.allowed_workspace, value, bytes);
  if (attribute == 3) std::memcpy(&state.allowed_reductions, value, bytes);
  return 0;
}
const char* cublasLtGetStatusName(int) { return "the fake refuses"; }
size_t cublasLtGetVersion() { return 130100; }

}  // extern "C"
#pragma GCC visibility pop
