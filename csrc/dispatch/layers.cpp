#include "dispatch/layers.h"

#include <mutex>
#include <vector>

#include "core/nvtx.h"
#include "dispatch/kernels.h"

namespace vt {

thread_local constinit ThreadState thread_state;
std::atomic<bool> any_override{false};

namespace {

std::mutex overrides_mutex;
Ref<Layer>* overrides() {
  static auto* table = new Ref<Layer>[kNumOps];
  return table;
}

struct ModeStack {
  std::vector<Ref<Layer>> layers;
  size_t depth = 0;  // modes above this index are off: a call of theirs is in progress
};
thread_local ModeStack modes;
thread_local std::vector<OpId> running;  // overrides whose body is running on this thread
thread_local int marked_op = -1;         // the op whose range has just begun on this thread

void refresh_any_override() {
  bool any = nvtx::ops_marked.load(std::memory_order_relaxed);
  for (int i = 0; i < kNumOps; ++i) any |= static_cast<bool>(overrides()[i]);
  any_override.store(any, std::memory_order_release);
}

void refresh_front_bit() {
  thread_state.front = static_cast<uint8_t>(modes.depth > 0 ? thread_state.front | kModes
                                                            : thread_state.front & ~kModes);
}

}  // namespace

KernelTable& kernels_for(DeviceType type) {
  static KernelTable tables[kNumDeviceTypes];
  return tables[static_cast<int>(type)];
}

void set_override(OpId id, Ref<Layer> layer) {
  const std::lock_guard lock(overrides_mutex);
  overrides()[static_cast<int>(id)] = std::move(layer);
  refresh_any_override();
}

bool mark_ops(bool marked) {
  const std::lock_guard lock(overrides_mutex);
  const bool before = nvtx::ops_marked.exchange(marked);
  refresh_any_override();
  return before;
}

Ref<Layer> get_override(OpId id) {
  const std::lock_guard lock(overrides_mutex);
  return overrides()[static_cast<int>(id)];
}

void push_mode(Ref<Layer> layer) {
  modes.layers.resize(modes.depth);
  modes.layers.push_back(std::move(layer));
  modes.depth = modes.layers.size();
  refresh_front_bit();
}

Ref<Layer> pop_mode() {
  check(modes.depth > 0, "no mode is active on this thread");
  Ref<Layer> top = modes.layers[--modes.depth];
  modes.layers.resize(modes.depth);
  refresh_front_bit();
  return top;
}

bool call_layer(OpId id, std::span<const Value> args, Value& result) {
  if (nvtx::ops_marked.load(std::memory_order_relaxed) && marked_op != static_cast<int>(id)) {
    const nvtx::OpRange range(op_name(id));
    const Scoped<int> marked(marked_op, static_cast<int>(id));
    result = call_op(id, args);
    return true;
  }
  if (modes.depth > 0) {
    const Ref<Layer> layer = modes.layers[modes.depth - 1];
    struct Lower {
      Lower() {
        --modes.depth;
        refresh_front_bit();
      }
      ~Lower() {
        ++modes.depth;
        refresh_front_bit();
      }
    } const lower;
    result = layer->call(id, args);
    return true;
  }
  if (any_override.load(std::memory_order_acquire)) {
    for (const OpId active : running) {
      if (active == id) return false;
    }
    if (const Ref<Layer> layer = get_override(id)) {
      struct Running {
        explicit Running(OpId id) { running.push_back(id); }
        ~Running() { running.pop_back(); }
      } const guard(id);
      result = layer->call(id, args);
      return true;
    }
  }
  return false;
}

}  // namespace vt
