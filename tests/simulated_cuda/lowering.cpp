// A graph as the hardware has it: the calls with the addresses and the numbers of the host that
// they had when they were taken over. What changes afterwards is seen only if it is in the control
// block.
#include "lowering.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "dispatch/thread_state.h"
#include "graphs/lowering.h"

namespace vt::simulated {
namespace {

using graphs::DeviceProgram;
using graphs::Instruction;
using graphs::Pool;
using graphs::PoolHandle;

class HostPool final : public Pool {
 public:
  HostPool(Device device, PoolHandle handle) : Pool(device), handle_(handle) {}
  PoolHandle handle() const override { return handle_; }
  Allocation allocate(size_t nbytes) override {
    return allocator_for(DeviceType::CUDA).allocate(nbytes, device());
  }
  Ref<Storage> arena(size_t nbytes) override {
    if (!arena_ || arena_->nbytes() < nbytes)
      arena_ = make_ref<Storage>(allocate(nbytes), device());
    return arena_;
  }

 private:
  PoolHandle handle_;
  Ref<Storage> arena_;
};

template <class F>
void for_each_tensor(Instruction& call, const F& f) {
  for (Value& value : call.args) {
    if (auto* tensor = std::get_if<Tensor>(&value)) {
      f(*tensor);
    } else if (auto* list = std::get_if<std::vector<Tensor>>(&value)) {
      for (Tensor& item : *list) f(item);
    }
  }
  for (Tensor& out : call.outputs) f(out);
}

std::atomic<int> refused{-1};  // the call that is not taken over
std::atomic<int> joins{0};

/// Keeps the ops that run on a stream which is captured: what they do is done in each run.
class StreamCapture final : public Consumer {
 public:
  explicit StreamCapture(std::vector<Instruction>& calls) : calls_(calls) {
    thread_state.consumer = this;
  }
  ~StreamCapture() override { thread_state.consumer = nullptr; }
  void on_op(const OpCall& call, FunctionRef<void()> execute) override {
    if (!call.outputs.empty() && call.outputs[0].device().is_cpu()) {
      for (const Value& value : call.args) {
        const auto* tensor = std::get_if<Tensor>(&value);
        if (tensor && tensor->defined()) on_host_read(*tensor, op_name(call.id).data());
      }
      execute();
      return;
    }
    for (const Value& value : call.args)
      check(!std::holds_alternative<PhiloxArgs>(value), "a random op on a captured stream");
    calls_.push_back({call.id,
                      {call.args.begin(), call.args.end()},
                      {call.outputs.begin(), call.outputs.end()},
                      -1,
                      0,
                      {}});
  }
  void on_host_read(const Tensor& tensor, const char* what) override {
    check(tensor.device().is_cpu(), "operation not permitted when stream is capturing: ", what);
  }

 private:
  std::vector<Instruction>& calls_;
};

/// The calls, with what the program's own functions put on the stream in the place of these: they
/// run once, as the graph is made.
std::vector<Instruction> captured(std::vector<Instruction> calls) {
  std::vector<Instruction> all;
  for (size_t i = 0; i < calls.size(); ++i) {
    if (calls[i].id != OpId::_foreign) {
      all.push_back(std::move(calls[i]));
      continue;
    }
    const size_t before = all.size();
    try {
      const StreamCapture capture(all);
      execute_kernel(calls[i].id, calls[i].args, calls[i].outputs);
    } catch (const Error& error) {
      all.resize(before);
      throw graphs::CallError(error.kind(),
                              str("op ", i + 1, " of ", calls.size(), ", ", op_name(calls[i].id),
                                  ", cannot be part of a graph: ", error.message()),
                              i);
    }
  }
  return all;
}

class Graph final : public DeviceProgram {
 public:
  Graph(std::vector<Instruction> calls, std::vector<graphs::Transfer> transfers,
        Ref<Storage> control, Ref<Pool> pool)
      : given_(calls.size()),
        calls_(captured(std::move(calls))),
        transfers_(std::move(transfers)),
        control_(std::move(control)),
        pool_(std::move(pool)) {
    for (auto& slot : slots_) slot.resize(control_->nbytes());
    for (size_t i = 0; i < calls_.size(); ++i) {
      Instruction& call = calls_[i];
      if (static_cast<int>(i) == refused)
        throw graphs::CallError(ErrorKind::Runtime, "simulated refusal", i);
      for_each_tensor(call, [&](Tensor& tensor) {
        if (!tensor.defined()) return;
        if (tensor.device().is_cpu()) {
          check(tensor.dim() == 0, op_name(call.id), ": a tensor of the host in a graph");
          Tensor number = empty({}, tensor.dtype());
          std::memcpy(number.data(), tensor.data(), static_cast<size_t>(tensor.itemsize()));
          number.impl()->wrapped_number = tensor.impl()->wrapped_number;
          tensor = number;
        } else {
          addresses_.emplace_back(tensor.storage().get(), tensor.storage()->data());
        }
      });
    }
  }

  void join() override { ++joins; }
  std::byte* control() override {
    for (const auto& [storage, data] : addresses_)
      check(storage->data() == data, "memory of a captured step has moved");
    return slots_[turn_].data();
  }
  void launch() override {
    std::vector<std::byte>& slot = slots_[turn_];
    std::memcpy(control_->data(), slot.data(), slot.size());
    std::memset(slot.data(), 0xCD, slot.size());
    turn_ = 1 - turn_;
    transfer(true);
    for (const Instruction& call : calls_) {
      if (call.rng < 0) {
        call.execute();
        continue;
      }
      std::vector<Value> args = call.args;
      PhiloxArgs& random = std::get<PhiloxArgs>(args[static_cast<size_t>(call.rng)]);
      check(random.state == control_->data(), "random numbers that are not the control block's");
      random = {random.state[0], random.state[1] + random.offset};
      call.execute(args);
    }
    transfer(false);
  }
  void extend() override {}
  std::vector<size_t> nodes() const override { return std::vector<size_t>(given_, 1); }
  std::map<std::string, size_t> node_kinds() const override { return {{"kernel", calls_.size()}}; }
  void dump(const std::string&) const override { fail("the simulated device has no DOT files"); }

 private:
  void transfer(bool before) const {
    for (const graphs::Transfer& t : transfers_) {
      void* other = nullptr;
      std::memcpy(&other, static_cast<const char*>(control_->data()) + t.address, sizeof other);
      if (t.before != before || !other) continue;
      std::memcpy(before ? t.place.data() : other, before ? other : t.place.data(), t.nbytes);
    }
  }

  size_t given_;  // calls of the program
  std::vector<Instruction> calls_;
  std::vector<graphs::Transfer> transfers_;
  Ref<Storage> control_;
  Ref<Pool> pool_;
  std::array<std::vector<std::byte>, 2> slots_;
  size_t turn_ = 0;
  std::vector<std::pair<const Storage*, const void*>> addresses_;
};

class HostLowering final : public graphs::Lowering {
 public:
  Ref<Pool> pool(Device device, PoolHandle wanted) override {
    static std::mutex mutex;
    static std::map<uint64_t, Ref<Pool>> shared;
    static uint64_t last = 0;
    const std::lock_guard lock(mutex);
    if (wanted == PoolHandle{}) return make_ref<HostPool>(device, PoolHandle{0, ++last});
    Ref<Pool>& found = shared[wanted.second];
    if (!found) found = make_ref<HostPool>(device, wanted);
    return found;
  }
  std::unique_ptr<DeviceProgram> lower(std::vector<Instruction> calls,
                                       std::vector<graphs::Transfer> transfers,
                                       Ref<Storage> control, Ref<Pool> pool) override {
    return std::make_unique<Graph>(std::move(calls), std::move(transfers), std::move(control),
                                   std::move(pool));
  }
};

}  // namespace

/// For tests: the call of that number is refused from now on; -1 for none.
extern "C" void vt_simulated_refuse(int call) { refused = call; }
/// How often the current stream was made to wait for earlier runs.
extern "C" int vt_simulated_joins() { return joins; }

void install_lowering() {
  static HostLowering lowering;
  graphs::set_lowering(DeviceType::CUDA, &lowering);
}

}  // namespace vt::simulated
