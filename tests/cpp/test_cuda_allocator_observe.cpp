// What can be seen: statistics against a plain count, snapshots, history, settings, the pinned
// allocator, the runtime's adapter.
#include "test_cuda_allocator.h"

#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "cuda/allocator/cuda_allocator.h"
#include "cuda/allocator/pinned_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

void statistics_match_a_plain_count() {
  SimulatedDevice device;
  CachingAllocator allocator(device, 0, {});
  const StreamHandle streams[] = {nullptr, device.create_stream(), device.create_stream()};
  std::mt19937_64 random(7);
  std::vector<Allocation> live;
  // [0]: small, [1]: large, [2]: both
  Stat count[3], bytes[3], requested[3];
  const auto apply = [](Stat& stat, int64_t delta) {
    stat.current += delta;
    stat.peak = std::max(stat.peak, stat.current);
    (delta > 0 ? stat.allocated : stat.freed) += std::abs(delta);
  };
  const auto note = [&](const Allocation& a, int sign) {
    const auto size = static_cast<int64_t>(CachingAllocator::block_size(a.context));
    for (int k : {a.nbytes <= MiB ? 0 : 1, 2}) {
      apply(count[k], sign);
      apply(bytes[k], sign * size);
      apply(requested[k], sign * static_cast<int64_t>(a.nbytes));
    }
  };
  const auto same = [](const Stat& a, const Stat& b) {
    return a.current == b.current && a.peak == b.peak && a.allocated == b.allocated &&
           a.freed == b.freed;
  };
  const auto all_same = [&](const StatByKind& stat, const Stat* expected) {
    return same(stat.small_pool, expected[0]) && same(stat.large_pool, expected[1]) &&
           same(stat.all, expected[2]);
  };
  for (int i = 0; i < 4000; ++i) {
    if (live.size() < 20 || random() % 2) {
      if (live.size() > 60) continue;
      const size_t nbytes = 1 + random() % (random() % 3 ? 300000 : 9 * MiB);
      live.push_back(allocator.allocate(nbytes, streams[random() % 3]));
      note(live.back(), 1);
    } else {
      const size_t index = random() % live.size();
      note(live[index], -1);
      give_back(live[index]);
      live[index] = live.back();
      live.pop_back();
    }
    if (i == 1000) {
      allocator.reset_peak_stats();
      for (auto* stats : {count, bytes, requested}) {
        for (int k = 0; k < 3; ++k) stats[k].peak = stats[k].current;
      }
    }
    if (i == 2000) {
      allocator.reset_accumulated_stats();
      for (auto* stats : {count, bytes, requested}) {
        for (int k = 0; k < 3; ++k) stats[k].allocated = stats[k].freed = 0;
      }
    }
    if (i % 100 == 0 || i > 3900) {
      const MemoryStats stats = allocator.stats();
      CHECK(all_same(stats.allocation, count));
      CHECK(all_same(stats.allocated_bytes, bytes));
      CHECK(all_same(stats.requested_bytes, requested));
      CHECK(all_same(stats.active_bytes, bytes));  // no other stream uses anything here
      CHECK(stats.reserved_bytes.all.current == static_cast<int64_t>(device.memory_in_use()));
    }
  }
  const auto flat = flatten(allocator.stats());
  std::set<std::string> keys;
  for (const auto& [key, value] : flat) keys.insert(key);
  CHECK(keys.size() == flat.size());
  for (const char* key :
       {"allocated_bytes.all.current", "reserved_bytes.small_pool.peak", "active.all.allocated",
        "inactive_split_bytes.large_pool.freed", "segment.all.current", "num_alloc_retries",
        "num_ooms", "num_sync_all_streams", "num_device_alloc", "num_device_free",
        "oversize_allocations.current", "requested_bytes.all.peak", "max_split_size"}) {
    CHECK(keys.contains(key));
  }
  CHECK(flat.size() == 9 * 12 + 2 * 4 + 6);
  for (const Allocation& a : live) give_back(a);
}

int contexts = 0;
AllocationContext new_context() noexcept { return std::make_shared<int>(++contexts); }

void snapshots_and_history_tell_the_state() {
  SimulatedDevice device;
  CachingAllocator allocator(device, 0, {});
  allocator.record_history({.mode = HistoryMode::All, .capture = new_context, .max_entries = 100});
  const StreamHandle side = device.create_stream();
  const Allocation a = allocator.allocate(1000, nullptr);
  const Allocation b = allocator.allocate(5 * MiB, side);
  const Allocation c = allocator.allocate(2000, nullptr);
  device.set_progress(0);
  device.launch(side, {{address_of(a), 10, true}});
  allocator.record_stream(a.context, side);
  give_back(a);
  give_back(c);
  const Snapshot snapshot = allocator.snapshot();
  CHECK(snapshot.segments.size() == 2);
  std::map<uintptr_t, std::string> states;
  for (const SegmentInfo& segment : snapshot.segments) {
    uintptr_t at = segment.address;
    size_t active = 0;
    for (const BlockInfo& block : segment.blocks) {
      CHECK(block.address == at);
      at += block.size;
      states[block.address] = block_state_name(block.state);
      if (states[block.address] != "inactive") active += block.size;
    }
    CHECK(at == segment.address + segment.total_size && active == segment.active_size);
    CHECK(segment.is_large == (segment.stream == side) && segment.is_expandable);
  }
  CHECK(states[address_of(a)] == "active_pending_free");
  CHECK(states[address_of(b)] == "active_allocated");
  CHECK(states[address_of(c)] == "inactive");
  std::vector<std::string> actions;
  for (const TraceEntry& entry : snapshot.trace) {
    actions.emplace_back(trace_action_name(entry.action));
    if (entry.action == TraceAction::Alloc && entry.address == address_of(b)) {
      CHECK(entry.context && *std::static_pointer_cast<int>(entry.context) == 2);
      CHECK(entry.size == 5 * MiB && entry.stream == side && entry.time_us > 0);
    }
  }
  CHECK(actions == (std::vector<std::string>{"segment_map", "alloc", "segment_map", "alloc",
                                             "alloc", "free_requested", "free_requested",
                                             "free_completed", "snapshot"}));
  CHECK(error_of([&] { allocator.allocate(4096 * MiB, nullptr); }).first == ErrorKind::OutOfMemory);
  give_back(b);
  allocator.empty_cache();
  actions.clear();
  for (const TraceEntry& entry : allocator.snapshot().trace) {
    actions.emplace_back(trace_action_name(entry.action));
  }
  CHECK(std::count(actions.begin(), actions.end(), "oom") == 1);
  CHECK(std::count(actions.begin(), actions.end(), "free_completed") == 3);
  CHECK(std::count(actions.begin(), actions.end(), "segment_unmap") >= 2);
  allocator.record_history({.mode = HistoryMode::All, .max_entries = 3});
  for (size_t n = 1; n <= 5; ++n) give_back(allocator.allocate(n * 512, nullptr));
  CHECK(allocator.snapshot().trace.size() == 3);  // the last three
  allocator.record_history({});
  CHECK(allocator.snapshot().trace.empty());
  CHECK_EMPTY(allocator.check_invariants());
}

std::vector<std::pair<std::string, int>> contexts_of(CachingAllocator& allocator) {
  std::vector<std::pair<std::string, int>> out;
  for (const TraceEntry& entry : allocator.snapshot().trace) {
    const auto context = std::static_pointer_cast<int>(entry.context);
    out.emplace_back(trace_action_name(entry.action), context ? *context : 0);
  }
  return out;
}

void history_keeps_the_contexts_asked_for() {
  SimulatedDevice device;
  CachingAllocator allocator(device, 0, {});
  give_back(allocator.allocate(1000, nullptr));  // maps the segment
  using Events = std::vector<std::pair<std::string, int>>;
  HistoryOptions options{.mode = HistoryMode::All, .capture = new_context, .max_entries = 100};
  const auto one = [&] {
    contexts = 0;
    allocator.record_history(options);
    give_back(allocator.allocate(1000, nullptr));
    return contexts_of(allocator);
  };
  CHECK(one() ==
        (Events{{"alloc", 1}, {"free_requested", 1}, {"free_completed", 1}, {"snapshot", 0}}));
  options.capture_free = new_context;
  CHECK(one() ==
        (Events{{"alloc", 1}, {"free_requested", 2}, {"free_completed", 2}, {"snapshot", 0}}));
  options.contexts = HistoryContexts::Alloc;
  CHECK(one() ==
        (Events{{"alloc", 1}, {"free_requested", 1}, {"free_completed", 1}, {"snapshot", 0}}));
  options.contexts = HistoryContexts::State;
  CHECK(one() ==
        (Events{{"alloc", 0}, {"free_requested", 0}, {"free_completed", 0}, {"snapshot", 0}}));
  CHECK(contexts == 1);
  options.contexts = HistoryContexts::None;
  one();
  CHECK(contexts == 0);
  // An event without a context is an event all the same.
  CHECK(contexts_of(allocator).size() == 5);
  options.skipped = uint32_t{1} << static_cast<int>(TraceAction::FreeRequested);
  options.clear = false;
  options.max_entries = 2;  // the newest two stay: both are snapshots
  allocator.record_history(options);
  CHECK(contexts_of(allocator) == (Events{{"snapshot", 0}, {"snapshot", 0}}));
  give_back(allocator.allocate(1000, nullptr));
  CHECK(allocator.snapshot(false).trace.empty());
  CHECK(contexts_of(allocator) == (Events{{"free_completed", 0}, {"snapshot", 0}}));
}

void observers_see_out_of_memory_before_it_is_thrown() {
  SimulatedDevice device;
  CachingAllocator allocator(device, 3, {});
  allocator.record_history({.mode = HistoryMode::All, .max_entries = 100});
  std::vector<CachingAllocator::OutOfMemoryEvent> seen;
  for (int i = 0; i < 2; ++i) {
    allocator.add_out_of_memory_observer([&](const CachingAllocator::OutOfMemoryEvent& event) {
      seen.push_back(event);
      CHECK(allocator.snapshot().trace.size() >= 2);  // no lock is held
    });
  }
  CHECK(error_of([&] { allocator.allocate(4096 * MiB, nullptr); }).first == ErrorKind::OutOfMemory);
  CHECK(seen.size() == 2 && seen[0].device_index == 3 && seen[0].requested == 4096 * MiB);
  CHECK(seen[0].free <= seen[0].total && seen[0].total > 0);
}

void settings_are_parsed_or_refused_by_name() {
  const AllocatorSettings s = parse_settings(
      " backend:async , expandable_segments:False, max_split_size_mb:64,"
      "garbage_collection_threshold:0.75,memory_fraction:0.5,memory_limit_mb:1000,"
      "pinned_cache_limit_mb:0,expandable_page_mb:2,roundup_power2_divisions:[256:1,512:2,>:4]");
  CHECK(s.backend == Backend::Async && !s.expandable_segments && s.expandable_page == 2 * MiB);
  CHECK(s.max_split_size == 64 * MiB && s.garbage_collection_threshold == 0.75);
  CHECK(s.memory_fraction == 0.5 && s.memory_limit == 1000 * MiB && s.pinned_cache_limit == 0);
  CHECK(s.roundup_power2_divisions[0] == 1 && s.roundup_power2_divisions[8] == 1);
  CHECK(s.roundup_power2_divisions[9] == 2 && s.roundup_power2_divisions[10] == 4);
  CHECK(format_settings(parse_settings(format_settings(s))) == format_settings(s));
  CHECK(parse_settings("").expandable_segments && parse_settings("").rounds_up() == false);
  const std::pair<const char*, const char*> bad[] = {
      {"backends:native", "unknown setting 'backends'"},
      {"backend", "write name:value"},
      {"backend:native,", "is not a setting"},
      {"backend:fast", "backend takes native or async"},
      {"expandable_segments:yes", "expandable_segments takes true or false"},
      {"expandable_segments:true,expandable_segments:true", "expandable_segments is given twice"},
      {"expandable_page_mb:1", "expandable_page_mb takes"},
      {"expandable_page_mb:4096", "expandable_page_mb takes"},
      {"max_split_size_mb:19", "max_split_size_mb takes whole MiB, at least 20"},
      {"max_split_size_mb:-1", "max_split_size_mb takes"},
      {"max_split_size_mb:99999999999999999999", "max_split_size_mb takes"},
      {"garbage_collection_threshold:1.5", "garbage_collection_threshold takes"},
      {"garbage_collection_threshold:nan", "garbage_collection_threshold takes"},
      {"memory_fraction:0", "memory_fraction takes"},
      {"memory_limit_mb:many", "memory_limit_mb takes"},
      {"roundup_power2_divisions:3", "roundup_power2_divisions takes"},
      {"roundup_power2_divisions:[3:2]", "powers of two"},
      {"roundup_power2_divisions:[64:2,32:4]", "ascending"},
      {"roundup_power2_divisions:[64]", "roundup_power2_divisions takes"},
      {"roundup_power2_divisions:[64:2", "roundup_power2_divisions takes"},
  };
  for (const auto& [text, part] : bad) {
    const auto [kind, message] = error_of([&] { parse_settings(text); });
    CHECK(kind == ErrorKind::Value);
    CHECK(contains(message, "VT_CUDA_ALLOC") && contains(message, part));
    if (!contains(message, part)) std::printf("%s gave: %s\n", text, message.c_str());
  }
  setenv("VT_CUDA_ALLOC", "memory_limit_mb:5", 1);
  CHECK(settings_from_environment().memory_limit == 5 * MiB);
  unsetenv("VT_CUDA_ALLOC");
  CHECK(settings_from_environment().memory_limit == AllocatorSettings::kNoLimit);
}

void pinned_memory_is_kept_and_guarded() {
  SimulatedOptions options;
  options.host_memory = 64 * MiB;
  SimulatedDevice device(options);
  device.set_progress(0);
  const StreamHandle side = device.create_stream();
  {
    PinnedAllocator pinned(device, {});
    CHECK(pinned.allocate(0).data == nullptr);
    CHECK(PinnedAllocator::block_size(1) == 4096 && PinnedAllocator::block_size(4097) == 5120);
    CHECK(PinnedAllocator::block_size(MiB + 1) == MiB + MiB / 4);
    Allocation a = pinned.allocate(MiB);
    const void* first = a.data;
    give_back(a);
    a = pinned.allocate(MiB - 100);  // of the same class: reused, as nothing copies
    CHECK(a.data == first && pinned.stats().num_host_alloc == 1);
    device.launch(side, {{address_of(a), 100, false}});
    pinned.record_stream(a.context, side);
    pinned.record_stream(a.context, side);
    give_back(a);
    CHECK(pinned.stats().pending_bytes == static_cast<int64_t>(MiB));
    const Allocation b = pinned.allocate(MiB);
    CHECK(b.data != first);
    device.use_on_host(address_of(b), MiB);
    device.synchronize_stream(side);
    const Allocation c = pinned.allocate(MiB);
    CHECK(c.data == first);
    device.use_on_host(address_of(c), MiB);
    give_back(b);
    give_back(c);
    CHECK(pinned.stats().peak_allocated_bytes == static_cast<int64_t>(2 * MiB));
    const PinnedStats counted = pinned.stats();
    CHECK(counted.owned_blocks.current == 2 && counted.owned_blocks.allocated == 2);
    CHECK(counted.owned_bytes.current == static_cast<int64_t>(2 * MiB));
    CHECK(counted.active_blocks.current == 0 && counted.active_blocks.peak == 2);
    CHECK(counted.active_blocks.allocated == 4 && counted.active_bytes.freed == 4 * int64_t{MiB});
    CHECK(counted.host_alloc_time.count == 2 && counted.host_free_time.count == 0);
    const auto flat = flatten(counted);
    CHECK(flat.size() == 4 * 4 + 2 * 5 + 2 && std::is_sorted(flat.begin(), flat.end()));
    pinned.reset_peak_stats();
    pinned.reset_accumulated_stats();
    CHECK(pinned.stats().active_blocks.peak == 0 && pinned.stats().owned_blocks.allocated == 0);
    CHECK(pinned.stats().owned_bytes.current == static_cast<int64_t>(2 * MiB));
    // Full: what is cached in other classes, or still copied from, makes room.
    device.launch(side, {{address_of(c), 100, false}});
    const Allocation d = pinned.allocate(MiB);
    pinned.record_stream(d.context, side);
    give_back(d);
    const Allocation big = pinned.allocate(64 * MiB);
    const auto [kind, message] = error_of([&] { pinned.allocate(10); });
    CHECK(kind == ErrorKind::OutOfMemory && contains(message, "10 bytes of pinned host memory"));
    CHECK(error_of([&] { pinned.allocate(SIZE_MAX); }).first == ErrorKind::OutOfMemory);
    give_back(big);
    CHECK_EMPTY(pinned.check_invariants());
    CHECK(pinned.empty_cache() == 64 * MiB);
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
  PinnedAllocator limited(device, parse_settings("pinned_cache_limit_mb:1"));
  give_back(limited.allocate(2 * MiB));
  CHECK(limited.stats().cached_bytes == 0 && limited.stats().num_host_free == 1);
}

StreamHandle current[2];

void the_runtime_allocates_on_the_current_stream() {
  SimulatedDevice first, second;
  CachingAllocator zero(first, 0, {}), one(second, 1, {});
  CudaAllocator cuda([](int device) { return current[device]; });
  cuda.add_device(&zero);
  cuda.add_device(&one);
  current[0] = first.create_stream();
  const Allocation a = cuda.allocate(100, {DeviceType::CUDA, 0});
  const Allocation b = cuda.allocate(100, {DeviceType::CUDA, 1});
  CHECK(CachingAllocator::stream_of(a.context) == current[0]);
  CHECK(CachingAllocator::stream_of(b.context) == nullptr);
  CHECK(zero.stats().allocation.all.current == 1 && one.stats().allocation.all.current == 1);
  give_back(a);
  give_back(b);
  for (int8_t index : {2, -1}) {
    const auto [kind, message] = error_of([&] { cuda.allocate(1, {DeviceType::CUDA, index}); });
    CHECK(kind == ErrorKind::Value && contains(message, "is not available"));
  }
}

}  // namespace

int main() {
  statistics_match_a_plain_count();
  snapshots_and_history_tell_the_state();
  history_keeps_the_contexts_asked_for();
  observers_see_out_of_memory_before_it_is_thrown();
  settings_are_parsed_or_refused_by_name();
  pinned_memory_is_kept_and_guarded();
  the_runtime_allocates_on_the_current_stream();
  return finish("test_cuda_allocator_observe");
}
