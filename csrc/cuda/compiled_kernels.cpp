#include "cuda/compiled_kernels.h"

#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "core/error.h"
#include "core/host_wait.h"
#include "cuda/nvrtc.h"
#include "cuda/relaxed_capture.h"

namespace vt::cuda {
namespace {

namespace fs = std::filesystem;

// The rules of the library's own build: no fast math, products contracted within a function only
// where nvcc does so too.
const std::array<std::string, 2> kOptions = {"--std=c++17", "--device-as-default-execution-space"};

/// FNV-1a. Source: Fowler, Noll and Vo.
uint64_t hash(std::string_view bytes, uint64_t seed) {
  uint64_t h = 0xcbf29ce484222325u ^ seed;
  for (const char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}
std::string hex(uint64_t value) {
  std::string out(16, '0');
  for (size_t i = 16; i-- > 0; value >>= 4) out[i] = "0123456789abcdef"[value & 15];
  return out;
}

/// What machine code depends on.
std::string key_of(const std::string& source, const std::string& architecture) {
  std::string key = str("nvrtc ", nvrtc_version(), "\n", architecture, "\n");
  for (const std::string& option : kOptions) key += option + "\n";
  return key + source;
}

// --- the folder. Nothing here fails: without it the code is compiled again.

std::optional<fs::path> folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  if (cache && *cache == '/') return fs::path(cache) / "vibetensor" / "kernels";
  if (home && *home == '/') return fs::path(home) / ".cache" / "vibetensor" / "kernels";
  return std::nullopt;
}
/// Whether code in the folder is our own: other users could neither make it nor put files there.
bool trusted(const fs::path& folder) {
  struct stat found{};
  return stat(folder.c_str(), &found) == 0 && S_ISDIR(found.st_mode) && found.st_uid == geteuid() &&
         (found.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}
fs::path file_of(const fs::path& in, const std::string& key) {
  return in / (hex(hash(key, 1)) + ".cubin");
}
/// Begins a file: it tells other sources with the same name, and code that was cut short.
std::string header(const std::string& key, const std::string& code) {
  return str("vibetensor kernel ", hex(hash(key, 2)), hex(hash(code, 3)), "\n");
}

std::string read_code(const std::string& key) try {
  const auto in = folder();
  if (!in || !trusted(*in)) return {};
  std::ifstream file(file_of(*in, key), std::ios::binary);
  if (!file) return {};
  const std::string all{std::istreambuf_iterator<char>(file), {}};
  const size_t end = all.find('\n');
  if (end == std::string::npos) return {};
  std::string code = all.substr(end + 1);
  return all.compare(0, end + 1, header(key, code)) == 0 ? code : std::string();
} catch (const std::exception&) {
  return {};
}

void write_code(const std::string& key, const std::string& code) try {
  static std::atomic<int> count{0};
  const auto in = folder();
  if (!in) return;
  std::error_code error;
  const bool made = fs::create_directories(*in, error);
  if (error) return;
  if (made) fs::permissions(*in, fs::perms::owner_all, error);
  if (!trusted(*in)) return;
  const fs::path part = *in / str("part-", getpid(), "-", count++);
  std::ofstream file(part, std::ios::binary);
  file << header(key, code) << code;
  file.close();
  if (file.good()) fs::rename(part, file_of(*in, key), error);  // whole or not at all
  if (!file.good() || error) fs::remove(part, error);
} catch (const std::exception&) {
}

// --- the process

cudaKernel_t load(const std::string& code, const std::string& name) {
  const RelaxedCapture relaxed;
  auto module = std::make_unique<Module>(code);
  const cudaKernel_t kernel = module->kernel(name);
  module.release();  // NOLINT: never unloaded
  return kernel;
}

cudaKernel_t make(const std::string& key, const std::string& source, const std::string& name,
                  const std::string& architecture) {
  if (const std::string code = read_code(key); !code.empty()) {
    try {
      return load(code, name);
    } catch (const Error&) {
      // What the folder had is no code for this driver.
    }
  }
  const CompiledCode made = nvrtc_compile(source, name + ".cu", architecture, kOptions);
  write_code(key, made.cubin);
  return load(made.cubin, name);
}

}  // namespace

cudaKernel_t compiled_kernel(const std::string& source, const std::string& name, int device) {
  static std::mutex mutex;
  static auto* known = new std::map<std::string, std::shared_future<cudaKernel_t>, std::less<>>;
  const std::string architecture = architecture_of(device);
  const std::string key = key_of(source, architecture);
  std::promise<cudaKernel_t> promise;
  std::shared_future<cudaKernel_t> future;
  bool mine = false;
  {
    const std::lock_guard lock(mutex);
    auto [at, added] = known->try_emplace(key);
    if (added) at->second = promise.get_future().share();
    mine = added;
    future = at->second;
  }
  if (mine) {
    try {
      const HostWait waiting;  // a compilation takes a second
      promise.set_value(make(key, source, name, architecture));
    } catch (...) {
      promise.set_exception(std::current_exception());
      const std::lock_guard lock(mutex);
      known->erase(key);  // another call may find what is missing now
    }
  }
  if (future.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    const HostWait waiting;  // for the thread that compiles it
    future.wait();
  }
  return future.get();
}

std::string compiler_problem() {
  try {
    nvrtc_version();
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace vt::cuda
