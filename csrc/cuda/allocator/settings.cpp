#include "cuda/allocator/settings.h"

#include <bit>
#include <charconv>
#include <cstdlib>
#include <vector>

#include "core/error.h"
#include "cuda/allocator/block.h"

namespace vt::cuda {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr std::string_view kNames =
    "backend, expandable_page_mb, expandable_segments, garbage_collection_threshold, "
    "max_split_size_mb, memory_fraction, memory_limit_mb, pinned_cache_limit_mb, "
    "roundup_power2_divisions";

std::string_view trim(std::string_view text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\n'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}

[[noreturn]] void refuse(std::string_view name, std::string_view value, std::string_view wanted) {
  fail(ErrorKind::Value, "VT_CUDA_ALLOC: ", name, ":", value, " is not valid; ", name, " takes ",
       wanted);
}

bool parse_bool(std::string_view name, std::string_view value) {
  if (value == "true" || value == "True" || value == "1") return true;
  if (value == "false" || value == "False" || value == "0") return false;
  refuse(name, value, "true or false");
}

template <class T>
bool parse_number(std::string_view value, T& out) {
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), out);
  return error == std::errc() && end == value.data() + value.size();
}

size_t parse_mib(std::string_view name, std::string_view value, size_t least) {
  uint64_t mib = 0;
  if (!parse_number(value, mib) || mib < least || mib > (uint64_t{1} << 40)) {
    refuse(name, value, str("whole MiB, at least ", least));
  }
  return static_cast<size_t>(mib) * kMiB;
}

double parse_fraction(std::string_view name, std::string_view value, bool zero_allowed) {
  double fraction = -1;
  if (!parse_number(value, fraction) || !(fraction >= 0) || fraction > 1 ||
      (fraction == 0 && !zero_allowed)) {
    refuse(name, value,
           zero_allowed ? "a number from 0 (off) to 1" : "a number above 0 and at most 1");
  }
  return fraction;
}

uint32_t parse_divisions(std::string_view name, std::string_view value, std::string_view whole) {
  uint32_t divisions = 0;
  if (!parse_number(value, divisions) || divisions > 64 ||
      (divisions != 0 && !std::has_single_bit(divisions))) {
    refuse(name, whole, "0 or a power of two up to 64, or [MiB:divisions,...,>:divisions]");
  }
  return divisions;
}

/// The entry of roundup_power2_divisions for a size.
int roundup_class(size_t nbytes) {
  const int log2 = 63 - std::countl_zero(static_cast<uint64_t>(nbytes | 1));
  const int index = log2 - 20;
  return index < 0
             ? 0
             : (index >= AllocatorSettings::kRoundupClasses ? AllocatorSettings::kRoundupClasses - 1
                                                            : index);
}

void parse_roundup(std::string_view name, std::string_view value, AllocatorSettings& settings) {
  auto& table = settings.roundup_power2_divisions;
  if (value.empty() || value.front() != '[') {
    table.fill(parse_divisions(name, value, value));
    return;
  }
  if (value.back() != ']') refuse(name, value, "a list that ends with ]");
  std::string_view rest = value.substr(1, value.size() - 2);
  int filled = 0;  // entries below it are set
  uint32_t last = 0;
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string_view item = trim(rest.substr(0, comma));
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
    const size_t colon = item.find(':');
    if (colon == std::string_view::npos) refuse(name, value, "MiB:divisions in its list");
    const std::string_view size = trim(item.substr(0, colon));
    last = parse_divisions(name, trim(item.substr(colon + 1)), value);
    if (size == ">") {
      for (; filled < AllocatorSettings::kRoundupClasses; ++filled) table[filled] = last;
      continue;
    }
    uint64_t mib = 0;
    if (!parse_number(size, mib) || !std::has_single_bit(mib) || mib > 65536) {
      refuse(name, value, "sizes that are powers of two, in MiB, up to 65536");
    }
    const int index = roundup_class(static_cast<size_t>(mib) * kMiB);
    if (index < filled) refuse(name, value, "sizes in ascending order");
    for (; filled <= index; ++filled) table[filled] = last;
  }
  for (; filled < AllocatorSettings::kRoundupClasses; ++filled) table[filled] = last;
}

void apply(std::string_view name, std::string_view value, AllocatorSettings& settings) {
  if (name == "backend") {
    if (value == "native") {
      settings.backend = Backend::Native;
    } else if (value == "async" || value == "cudaMallocAsync") {
      settings.backend = Backend::Async;
    } else {
      refuse(name, value, "native or async");
    }
  } else if (name == "expandable_segments") {
    settings.expandable_segments = parse_bool(name, value);
  } else if (name == "expandable_page_mb") {
    settings.expandable_page = parse_mib(name, value, 2);
    if (settings.expandable_page > size_t{1} << 30) refuse(name, value, "2 to 1024 MiB");
  } else if (name == "max_split_size_mb") {
    settings.max_split_size = align_up(parse_mib(name, value, 20), kLargeRounding);
  } else if (name == "garbage_collection_threshold") {
    settings.garbage_collection_threshold = parse_fraction(name, value, true);
  } else if (name == "memory_fraction") {
    settings.memory_fraction = parse_fraction(name, value, false);
  } else if (name == "memory_limit_mb") {
    settings.memory_limit = parse_mib(name, value, 1);
  } else if (name == "pinned_cache_limit_mb") {
    settings.pinned_cache_limit = parse_mib(name, value, 0);
  } else if (name == "roundup_power2_divisions") {
    parse_roundup(name, value, settings);
  } else {
    fail(ErrorKind::Value, "VT_CUDA_ALLOC: unknown setting '", name, "'; the settings are ",
         kNames);
  }
}

/// Splits at commas outside brackets.
std::vector<std::string_view> split_settings(std::string_view text) {
  std::vector<std::string_view> items;
  size_t begin = 0;
  int depth = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i == text.size() || (text[i] == ',' && depth == 0)) {
      items.push_back(trim(text.substr(begin, i - begin)));
      begin = i + 1;
    } else if (text[i] == '[') {
      ++depth;
    } else if (text[i] == ']') {
      --depth;
    }
  }
  return items;
}

}  // namespace

bool AllocatorSettings::rounds_up() const {
  for (const uint32_t divisions : roundup_power2_divisions) {
    if (divisions > 1) return true;
  }
  return false;
}

size_t AllocatorSettings::block_size(size_t nbytes) const {
  const size_t plain = align_up(nbytes, kBlockAlignment);
  if (plain <= kBlockAlignment) return plain;
  const uint32_t divisions = roundup_power2_divisions[roundup_class(nbytes)];
  if (divisions <= 1 || std::has_single_bit(nbytes)) return plain;
  const size_t floor = std::bit_floor(nbytes);
  const size_t step = floor / divisions;
  if (step < kBlockAlignment) return plain;
  return align_up(nbytes, step);
}

AllocatorSettings parse_settings(std::string_view text) {
  AllocatorSettings settings;
  std::vector<std::string_view> seen;
  if (trim(text).empty()) return settings;
  for (const std::string_view item : split_settings(text)) {
    const size_t colon = item.find(':');
    if (item.empty() || colon == std::string_view::npos) {
      fail(ErrorKind::Value, "VT_CUDA_ALLOC: '", item,
           "' is not a setting; write name:value, separated by commas. The settings are ", kNames);
    }
    const std::string_view name = trim(item.substr(0, colon));
    for (const std::string_view other : seen) {
      if (other == name) fail(ErrorKind::Value, "VT_CUDA_ALLOC: ", name, " is given twice");
    }
    seen.push_back(name);
    apply(name, trim(item.substr(colon + 1)), settings);
  }
  return settings;
}

AllocatorSettings settings_from_environment() {
  const char* text = std::getenv("VT_CUDA_ALLOC");
  return text ? parse_settings(text) : AllocatorSettings{};
}

std::string format_settings(const AllocatorSettings& settings) {
  std::string out = str("backend:", settings.backend == Backend::Native ? "native" : "async",
                        ",expandable_segments:", settings.expandable_segments ? "true" : "false",
                        ",expandable_page_mb:", settings.expandable_page / kMiB);
  const auto limit = [&](std::string_view name, size_t nbytes) {
    if (nbytes != AllocatorSettings::kNoLimit) out += str(",", name, ":", nbytes / kMiB);
  };
  limit("max_split_size_mb", settings.max_split_size);
  limit("memory_limit_mb", settings.memory_limit);
  limit("pinned_cache_limit_mb", settings.pinned_cache_limit);
  if (settings.garbage_collection_threshold > 0) {
    out += str(",garbage_collection_threshold:", settings.garbage_collection_threshold);
  }
  if (settings.memory_fraction < 1) out += str(",memory_fraction:", settings.memory_fraction);
  if (settings.rounds_up()) {
    out += ",roundup_power2_divisions:[";
    for (int i = 0; i < AllocatorSettings::kRoundupClasses; ++i) {
      out += str(i ? "," : "", size_t{1} << i, ":", settings.roundup_power2_divisions[i]);
    }
    out += ']';
  }
  return out;
}

}  // namespace vt::cuda
