#include "core/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace vt {
namespace {

#if defined(__linux__)

/// 0 when the mask cannot be read.
int cores_in_affinity_mask() {
  // The kernel refuses masks smaller than its own, whose size is not told; so try larger ones.
  for (int cpus = 1024; cpus <= 1 << 16; cpus *= 4) {
    cpu_set_t* mask = CPU_ALLOC(cpus);
    if (!mask) return 0;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    if (sched_getaffinity(0, bytes, mask) != 0) {
      CPU_FREE(mask);
      continue;
    }
    std::set<std::string> cores;
    for (int cpu = 0; cpu < cpus; ++cpu) {
      if (!CPU_ISSET_S(cpu, bytes, mask)) continue;
      std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                         "/topology/thread_siblings_list");
      std::string siblings;
      if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
      cores.insert(siblings);
    }
    CPU_FREE(mask);
    return static_cast<int>(cores.size());
  }
  return 0;
}

/// CPUs granted by "<quota> <period>" of a cgroup; 0 when there is no bound.
double quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::strtod(quota.c_str(), nullptr) / period;
}
double quota_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
  std::ifstream period_file(folder + "/cpu.cfs_period_us");
  double quota = 0;
  double period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return 0;
  return quota / period;
}

/// The tightest quota of this process's cgroup and the groups above it; 0 when there is none.
double cgroup_quota() {
  double tightest = 0;
  const auto visit = [&](std::string path, const std::string& root,
                         double (*read)(const std::string&)) {
    for (;;) {
      const double cpus = read(root + path);
      if (cpus > 0) tightest = tightest > 0 ? std::min(tightest, cpus) : cpus;
      if (path.empty()) return;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  };
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {  // hierarchy:controllers:path
    std::istringstream fields(line);
    std::string hierarchy, controllers, path;
    std::getline(fields, hierarchy, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    if (path == "/") path.clear();
    if (controllers.empty()) {
      visit(path, "/sys/fs/cgroup", quota_v2);
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      visit(path, "/sys/fs/cgroup/cpu", quota_v1);
    }
  }
  return tightest;
}

#endif

}  // namespace

int available_cores() {
  int cores = 0;
#if defined(__linux__)
  cores = cores_in_affinity_mask();
  const double quota = cgroup_quota();
  if (quota > 0 && cores > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
#endif
  if (cores <= 0) cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(cores, 1);
}

}  // namespace vt
