// Snapshots and the record of what the allocators did, as Python objects with torch's names.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "core/error.h"
#include "cuda/allocator.h"
#include "cuda/device.h"
#include "python/cuda/bindings.h"
#include "python/cuda/frames.h"

namespace nb = nanobind;

namespace vt::cuda {
namespace {

uintptr_t number(StreamHandle stream) { return reinterpret_cast<uintptr_t>(stream); }
nb::tuple pool_tuple(MempoolId pool) { return nb::make_tuple(pool.first, pool.second); }
nb::str text(std::string_view view) { return nb::str(view.data(), view.size()); }

nb::dict segment_dict(const SegmentInfo& segment, FrameLists& frames) {
  nb::list blocks;
  for (const BlockInfo& block : segment.blocks) {
    nb::dict out;
    out["address"] = block.address;
    out["size"] = block.size;
    out["requested_size"] = block.requested_size;
    out["state"] = text(block_state_name(block.state));
    out["frames"] = frames.of(block.context);
    blocks.append(out);
  }
  nb::dict out;
  out["device"] = segment.device;
  out["address"] = segment.address;
  out["total_size"] = segment.total_size;
  out["allocated_size"] = segment.allocated_size;
  out["active_size"] = segment.active_size;
  out["requested_size"] = segment.requested_size;
  out["stream"] = number(segment.stream);
  out["segment_type"] = segment.is_large ? "large" : "small";
  out["segment_pool_id"] = pool_tuple(segment.pool);
  out["is_expandable"] = segment.is_expandable;
  out["frames"] = frames.of(segment.context);
  out["blocks"] = blocks;
  return out;
}

nb::dict trace_dict(const TraceEntry& entry, FrameLists& frames) {
  nb::dict out;
  out["action"] = text(trace_action_name(entry.action));
  out[entry.action == TraceAction::Oom ? "device_free" : "addr"] = entry.address;
  out["size"] = entry.size;
  out["stream"] = number(entry.stream);
  out["pool_id"] = pool_tuple(entry.pool);
  out["time_us"] = entry.time_us;
  out["frames"] = frames.of(entry.context);
  return out;
}

nb::dict settings_dict(const AllocatorSettings& settings) {
  const auto size_or_minus_one = [](size_t nbytes) {
    return nbytes == AllocatorSettings::kNoLimit ? int64_t{-1} : static_cast<int64_t>(nbytes);
  };
  nb::dict divisions;
  for (int i = 0; i < AllocatorSettings::kRoundupClasses; ++i) {
    divisions[nb::str(std::to_string(uint64_t{1} << i).c_str())] =
        settings.roundup_power2_divisions[static_cast<size_t>(i)];
  }
  nb::dict out;
  out["VT_CUDA_ALLOC"] = format_settings(settings);
  out["backend"] = settings.backend == Backend::Async ? "cudaMallocAsync" : "native";
  out["expandable_segments"] = settings.expandable_segments;
  out["max_split_size"] = size_or_minus_one(settings.max_split_size);
  out["garbage_collection_threshold"] = settings.garbage_collection_threshold;
  out["memory_fraction"] = settings.memory_fraction;
  out["memory_limit"] = size_or_minus_one(settings.memory_limit);
  out["roundup_power2_divisions"] = divisions;
  return out;
}

/// Of all devices in use; of one pool or all; `segments_needed` refuses what has none to show.
nb::dict snapshot(const std::optional<MempoolId>& pool, bool with_traces, bool segments_needed) {
  std::vector<Snapshot> snapshots(static_cast<size_t>(device_count()));
  {
    const nb::gil_scoped_release released;
    for (int device = 0; device < device_count(); ++device) {
      CachingAllocator* allocator = device_allocator_if_used(device);
      if (!allocator) continue;
      if (segments_needed && allocator->settings().backend == Backend::Async) {
        fail(ErrorKind::NotImplemented,
             "memory_snapshot: with backend:async the memory is the driver's, which does not show "
             "its segments; remove backend:async from VT_CUDA_ALLOC");
      }
      snapshots[static_cast<size_t>(device)] = allocator->snapshot(with_traces);
    }
  }
  FrameLists frames;
  nb::list segments, traces;
  for (const Snapshot& one : snapshots) {
    for (const SegmentInfo& segment : one.segments) {
      if (!pool || segment.pool == *pool) segments.append(segment_dict(segment, frames));
    }
    nb::list trace;
    for (const TraceEntry& entry : one.trace) {
      if (!pool || entry.pool == *pool) trace.append(trace_dict(entry, frames));
    }
    traces.append(trace);
  }
  nb::dict out;
  out["segments"] = segments;
  out["device_traces"] = traces;
  out["allocator_settings"] = settings_dict(settings_from_environment());
  out["external_annotations"] = nb::list();
  return out;
}

uint32_t bits_of(const std::vector<std::string>& actions) {
  uint32_t bits = 0;
  for (const std::string& name : actions) {
    int found = -1;
    for (int i = 0; i <= static_cast<int>(TraceAction::Snapshot); ++i) {
      if (trace_action_name(static_cast<TraceAction>(i)) == name) found = i;
    }
    check_value(found >= 0, "_record_memory_history: unknown action '", name, "' in skip_actions");
    bits |= uint32_t{1} << found;
  }
  return bits;
}

}  // namespace

void bind_memory_history(nb::module_& m) {
  m.def("record_history", [](int mode, int contexts, size_t max_entries,
                             const std::vector<std::string>& skipped, bool clear) {
    record_history({.mode = static_cast<HistoryMode>(mode),
                    .contexts = static_cast<HistoryContexts>(contexts),
                    .capture = &capture_python_stack,
                    .capture_free = &capture_python_stack_if_held,
                    .max_entries = max_entries,
                    .skipped = bits_of(skipped),
                    .clear = clear});
  });
  m.def("snapshot", [](bool with_traces) { return snapshot({}, with_traces, false); });
  m.def(
      "memory_snapshot",
      [](const nb::object& pool, bool with_traces) {
        std::optional<MempoolId> id;
        if (!pool.is_none()) {
          const auto [first, second] = nb::cast<std::pair<uint64_t, uint64_t>>(pool);
          id = MempoolId{first, second};
        }
        return snapshot(id, with_traces, true);
      },
      nb::arg().none(), nb::arg());
  m.def("captured_stacks", &captured_stacks);
  m.def(
      "python_stack",
      [](bool gil, bool wait) {
        AllocationContext context;
        if (gil) {
          context = wait ? capture_python_stack() : capture_python_stack_if_held();
        } else {
          const nb::gil_scoped_release released;
          context = wait ? capture_python_stack() : capture_python_stack_if_held();
        }
        return FrameLists().of(context);
      },
      nb::arg("gil") = true, nb::arg("wait") = true,
      "The frames that an allocation here would be recorded with.");
}

}  // namespace vt::cuda
