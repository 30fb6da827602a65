// What NVTX is asked to show, as lines of text: "push NAME", "pop", "start NAME", "end ID", "mark
// NAME". For tests, which read them through ctypes.
#include <cstdint>
#include <mutex>
#include <string>

namespace {

std::mutex mutex;
std::string lines, taken;
uint64_t started = 0;
thread_local int depth = 0;

void add(const std::string& line) {
  const std::lock_guard lock(mutex);
  lines += line;
  lines += '\n';
}

}  // namespace

extern "C" {

int nvtxRangePushA(const char* name) {
  add(std::string("push ") + name);
  return depth++;
}
int nvtxRangePop() {
  add("pop");
  return --depth;
}
uint64_t nvtxRangeStartA(const char* name) {
  add(std::string("start ") + name);
  const std::lock_guard lock(mutex);
  return ++started;
}
void nvtxRangeEnd(uint64_t range) { add("end " + std::to_string(range)); }
void nvtxMarkA(const char* name) { add(std::string("mark ") + name); }

/// The lines since the last call; good until the next one.
const char* vt_stub_nvtx_taken() {
  const std::lock_guard lock(mutex);
  taken.swap(lines);
  lines.clear();
  return taken.c_str();
}
}
