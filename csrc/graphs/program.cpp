#include "graphs/program.h"

#include <algorithm>
#include <cstring>

#include "dispatch/kernels.h"

namespace vt::graphs {
namespace {

constexpr size_t kUploadAlignment = 16;
// Up to here one thread copies as fast as several.
constexpr size_t kSmallCopy = size_t{256} << 10;

struct Cleared {
  std::vector<const void*>& addresses;
  ~Cleared() { std::fill(addresses.begin(), addresses.end(), nullptr); }
};

template <class F>
void for_each_input(const Instruction& instruction, const F& f) {
  for (const Value& value : instruction.args) {
    if (const auto* tensor = std::get_if<Tensor>(&value)) {
      if (tensor->defined()) f(*tensor);
    } else if (const auto* list = std::get_if<std::vector<Tensor>>(&value)) {
      for (const Tensor& item : *list) {
        if (item.defined()) f(item);
      }
    }
  }
}

}  // namespace

void Program::add(const Call& call, TensorSpan inputs, TensorSpan outputs) {
  check(!device_program_, "nothing can be added to a program that is lowered");
  check(outputs.size() == call.outputs.size(), op_name(call.id), ": ", call.outputs.size(),
        " outputs to bind, not ", outputs.size());
  Instruction instruction{.id = call.id,
                          .args = call.bind(inputs),
                          .outputs = {outputs.begin(), outputs.end()},
                          .device = {},
                          .switches = call.switches};
  for (const Tensor& out : outputs) {
    if (!out.defined()) continue;
    instruction.device = out.device();
    break;
  }
  for (size_t i = 0; i < instruction.args.size(); ++i) {
    if (!std::holds_alternative<PhiloxArgs>(instruction.args[i])) continue;
    instruction.rng = static_cast<int>(i);
    instruction.random_offset = call.random_offset;
  }
  steps_.push_back({false, instructions_.size()});
  instructions_.push_back(std::move(instruction));
  for (const Tensor& out : outputs) {
    if (out.defined() &&
        std::find(written_.begin(), written_.end(), out.storage()) == written_.end())
      written_.push_back(out.storage());
  }
}

void Program::draw(Device device, uint64_t counters) { draws_.push_back({device, counters}); }

Tensor Program::upload(const Tensor& host, Device device) {
  check(!device_program_, "nothing can be added to a program that is lowered");
  check(host.device().is_cpu() && !device.is_cpu(), "upload: from the CPU to a device, not from ",
        host.device(), " to ", device);
  if (!control_) control_ = make_ref<Storage>(Allocation{}, device);  // bytes come with lower()
  Upload made{host, control_bytes_, static_cast<size_t>(host.numel() * host.itemsize())};
  control_bytes_ += (made.nbytes + kUploadAlignment - 1) / kUploadAlignment * kUploadAlignment;
  auto impl = make_ref<TensorImpl>(control_, host.dtype(), device);
  impl->set_geometry(host.sizes(), contiguous_strides(host.sizes()),
                     static_cast<int64_t>(made.offset) / host.itemsize());
  steps_.push_back({true, uploads_.size()});
  uploads_.push_back(std::move(made));
  return Tensor(std::move(impl));
}

size_t Program::add_transfer(const Tensor& place, size_t nbytes, bool before) {
  check(!device_program_, "nothing can be added to a program that is lowered");
  check(!place.device().is_cpu(), "a transfer is a device's, not one of ", place.device());
  transfers_.push_back({place, nbytes, control_bytes_, before});
  bound_.push_back(nullptr);
  control_bytes_ += kUploadAlignment;
  return transfers_.size() - 1;
}

size_t Program::copy_in(const Tensor& place) {
  return add_transfer(place, static_cast<size_t>(place.numel() * place.itemsize()), true);
}

size_t Program::copy_out(const Tensor& base) {
  auto impl = make_ref<TensorImpl>(base.storage(), DType::UInt8, base.device());
  const size_t nbytes = base.storage()->nbytes();
  const Dims all{static_cast<int64_t>(nbytes)}, dense{1};
  impl->set_geometry(all, dense, 0);
  return add_transfer(Tensor(std::move(impl)), nbytes, false);
}

void Program::check_lowerable(const Instruction& instruction, Device device) const {
  const bool host = instruction.device.is_cpu();
  check(host || instruction.device == device, op_name(instruction.id), " on ", instruction.device,
        " in a captured step on ", device, ": a step runs on one device");
  for_each_input(instruction, [&](const Tensor& tensor) {
    if (host)
      check(tensor.device().is_cpu(), op_name(instruction.id), " on the CPU reads a tensor of ",
            tensor.sizes(), " on ", tensor.device(),
            ": the host would have to wait for the device in the middle of a captured step");
    else
      check(tensor.device() == device || tensor.dim() == 0, op_name(instruction.id), " on ", device,
            " reads a tensor of ", tensor.sizes(), " on ", tensor.device());
  });
}

void Program::lower(Ref<Pool> pool) {
  check(!device_program_, "a program is lowered once");
  device_ = pool->device();
  for (const Instruction& instruction : instructions_) check_lowerable(instruction, device_);
  for (const Draw& draw : draws_)
    check(draw.device.is_cpu() || draw.device == device_, "a captured step on ", device_,
          " draws random numbers of ", draw.device);
  if (!control_) control_ = make_ref<Storage>(Allocation{}, device_);
  control_->replace(pool->allocate(control_bytes_));
  // The device's calls keep copies of the arguments: it needs them for as long as a run lasts,
  // which may be longer than this program lives.
  std::vector<Instruction> calls;
  std::vector<Step> host;
  for (const Step& step : steps_) {
    if (step.is_upload || instructions_[step.index].device.is_cpu()) {
      host.push_back(step);
      continue;
    }
    calls.push_back(instructions_[step.index]);
    on_device_.push_back(step.index);
    Instruction& call = calls.back();
    if (call.rng < 0) continue;
    call.args[static_cast<size_t>(call.rng)] =
        PhiloxArgs{0, static_cast<uint64_t>(std::max<int64_t>(call.random_offset, 0)),
                   static_cast<const uint64_t*>(control_->data())};
  }
  const NoGrad no_grad;
  try {
    device_program_ =
        lowering_for(device_.type).lower(std::move(calls), transfers_, control_, std::move(pool));
  } catch (const CallError& error) {
    failed_op_ = static_cast<int64_t>(on_device_[error.call()]);
    throw;
  }
  steps_ = std::move(host);
}

void Program::reserve() {
  for (const Draw& draw : draws_) {
    const PhiloxArgs base = default_generator(draw.device)->reserve(draw.counters);
    if (device_program_ && draw.device == device_) {
      drawn_ = base;  // its calls read the control block
      continue;
    }
    for (Instruction& instruction : instructions_) {
      if (instruction.rng < 0 || instruction.device != draw.device) continue;
      instruction.args[static_cast<size_t>(instruction.rng)] =
          PhiloxArgs{base.seed, base.offset + static_cast<uint64_t>(instruction.random_offset)};
    }
  }
}

void Program::run() {
  check(thread_state.consumer == nullptr,
        "a captured step cannot be replayed inside a recording: captured steps do not nest");
  const Scoped<bool> no_grad(thread_state.grad_enabled, false);
  if (device_program_) {
    // The ends of copies are those of one run, also of one that fails.
    const Cleared cleared{bound_};
    run_lowered();
  } else {
    reserve();
    run_in_order();
  }
  count_changes();
}

void Program::run_in_order() {
  if (instructions_.empty()) return;
  // Nearly always the same for all: set once.
  const uint32_t common = instructions_.front().switches;
  const KernelSwitchesAs as_recorded(common);
  for (const Instruction& call : instructions_) {
    if (call.switches == common)
      call.execute_as_is();
    else
      call.execute();
  }
}

void Program::count_changes() {
  // Hundreds of counters, far apart: without locked instructions the processor waits for many of
  // them at once. A change that another thread counts meanwhile may get lost; that there was one
  // does not.
  for (const Ref<Storage>& storage : written_) {
    std::atomic<uint32_t>& version = storage->version();
    version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
}

void Program::Upload::copy_to(std::byte* control) const {
  if (nbytes == 0) return;
  if (nbytes <= kSmallCopy && host.is_contiguous()) {
    std::memcpy(control + offset, host.data(), nbytes);
    return;
  }
  auto place = make_ref<Storage>(Allocation{control + offset, nbytes, nullptr, nullptr}, Device{});
  auto impl = make_ref<TensorImpl>(std::move(place), host.dtype(), Device{});
  impl->set_contiguous(host.sizes(), host.numel());
  kernels_for(DeviceType::CPU).copy_(Tensor(std::move(impl)), host, false);
}

void Program::run_lowered() {
  // First, as it may throw: nothing has been changed yet.
  std::byte* control = device_program_->control();
  reserve();
  const uint64_t random[] = {drawn_.seed, drawn_.offset};
  std::memcpy(control, random, sizeof random);
  for (size_t i = 0; i < transfers_.size(); ++i)
    std::memcpy(control + transfers_[i].address, &bound_[i], sizeof bound_[i]);
  for (const Step& step : steps_) {
    if (!step.is_upload) {
      instructions_[step.index].execute();
      continue;
    }
    uploads_[step.index].copy_to(control);
  }
  device_program_->launch();
}

void Program::run_op(size_t index) {
  check_index(index < instructions_.size(), "a program of ", instructions_.size(),
              " ops has none at ", index);
  check(!device_program_, "the ops of a program that is lowered do not run by themselves");
  check(thread_state.consumer == nullptr, "a captured op cannot be run inside a recording");
  const Scoped<bool> no_grad(thread_state.grad_enabled, false);
  instructions_[index].execute();
}

std::vector<size_t> Program::nodes() const {
  if (!device_program_) return {};
  std::vector<size_t> all(instructions_.size(), 0);
  const std::vector<size_t> found = device_program_->nodes();
  for (size_t i = 0; i < found.size(); ++i) all[on_device_[i]] = found[i];
  return all;
}

}  // namespace vt::graphs
