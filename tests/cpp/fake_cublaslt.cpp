// A library with the functions of cuBLASLt that the backend calls. It computes nothing.
#include "fake_cublaslt.h"

#include <cstring>

namespace {

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
                   const void*, void*, void*, void*, const void*, void* workspace, size_t bytes,
                   void*) {
  if (const int status = next()) return status;
  state.last_workspace = workspace;
  state.last_bytes = bytes;
  if (state.on_product) state.on_product();
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                   void* results, int* found) {
  if (const int status = next()) return status;
  std::memset(results, 0, 64);
  std::memcpy(static_cast<char*>(results) + 64, &state.workspace, sizeof state.workspace);
  std::memset(static_cast<char*>(results) + 72, 0, 24);
  return *found = 1, 0;
}
int cublasLtMatmulDescCreate(void** made, int, int) { return create(made); }
int cublasLtMatmulDescDestroy(void* made) { return destroy(made); }
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return next(); }
int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) {
  return create(made);
}
int cublasLtMatrixLayoutDestroy(void* made) { return destroy(made); }
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return next(); }
int cublasLtMatmulPreferenceCreate(void** made) { return create(made); }
int cublasLtMatmulPreferenceDestroy(void* made) { return destroy(made); }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return next(); }
const char* cublasLtGetStatusName(int) { return "the fake refuses"; }
size_t cublasLtGetVersion() { return 130100; }

}  // extern "C"
#pragma GCC visibility pop
