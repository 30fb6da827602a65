#include "graphs/tape.h"

#include <algorithm>

#include "autograd/engine.h"

namespace vt::graphs {
namespace {

/// Calls f(tensor) for every tensor among boxed arguments, undefined ones too.
template <class Values, class F>
void for_each_tensor(Values& values, const F& f) {
  for (auto& value : values) {
    if (auto* tensor = std::get_if<Tensor>(&value)) {
      f(*tensor);
    } else if (auto* list = std::get_if<std::vector<Tensor>>(&value)) {
      for (auto& item : *list) f(item);
    }
  }
}

Phase phase_of(OpId id) {
  if (autograd::in_backward()) return Phase::Backward;
  return op_capture_class(id) == "optimizer" ? Phase::Optimizer : Phase::Forward;
}

bool is_in_place(OpId id) { return op_name(id).ends_with('_'); }

constexpr const char* kReseeded =
    "a captured random op draws from the default generator of its device, and nothing else moves "
    "that: a generator of its own, a seed set or numbers drawn again (activation checkpointing) "
    "inside the captured function cannot be repeated by a replay";

}  // namespace

std::vector<Value> Call::bind(TensorSpan tensors) const {
  std::vector<Value> bound = args;
  size_t at = 0;
  for_each_tensor(bound, [&](Tensor& tensor) {
    check(at < tensors.size(), op_name(id), ": too few tensors to bind");
    tensor = tensors[at++];
  });
  check(at == tensors.size(), op_name(id), ": too many tensors to bind");
  return bound;
}

Tape::Tape(const Source* (*source)(), Recording recording)
    : source_(source), recording_(recording) {}

int Tape::storage_of(const Tensor& tensor, bool written) {
  const Ref<Storage>& storage = tensor.storage();
  const auto [place, added] = known_.try_emplace(storage.get(), static_cast<int>(storages_.size()));
  if (added) {
    const auto born = born_.find(storage.get());
    // Blank memory that is read first was filled by the host (a number as a tensor).
    const bool fresh = born != born_.end() && born->second == Origin::Blank && written;
    StorageRecord record{storage, storage->nbytes(), tensor.device(), {}, fresh, false, false};
    record.host = born != born_.end() && !fresh;
    if (born == born_.end()) record.first = tensor;
    storages_.push_back(std::move(record));
    if (fresh) open_.push_back(place->second);
  }
  const StorageRecord& record = storages_[static_cast<size_t>(place->second)];
  check(!(written && record.host), "a tensor of ", tensor.sizes(), " ", tensor.dtype(),
        " that the captured function makes from host data is changed in place: every replay would "
        "go on from the changed values. Make it outside, or write x = x + 1 instead of x += 1");
  return place->second;
}

int Tape::slot_of(const Tensor& tensor, bool written) {
  if (!tensor.defined()) return -1;
  Slot slot{storage_of(tensor, written), tensor.storage_offset(), tensor.impl()->sizes,
            tensor.impl()->strides, tensor.dtype()};
  slots_.push_back(std::move(slot));
  return static_cast<int>(slots_.size()) - 1;
}

void Tape::allocated(const Storage& storage) { born_[&storage] = Origin::Blank; }
void Tape::host_written(const Storage& storage) { born_[&storage] = Origin::Host; }

int64_t Tape::relative_offset(const PhiloxArgs& rng, Device device) {
  const Generator& generator = default_generator(device);
  const uint64_t now = generator->offset();
  auto draws = std::find_if(draws_.begin(), draws_.end(),
                            [&](const Draws& d) { return d.device == device; });
  if (draws == draws_.end()) {
    const bool moved = device.is_cpu() && (rng.seed != start_.seed || rng.offset != start_.offset);
    check(!moved, kReseeded);
    draws_.push_back({device, generator->seed(), rng.offset, rng.offset});
    draws = draws_.end() - 1;
  }
  check(rng.seed == generator->seed() && rng.seed == draws->seed && rng.offset == draws->last &&
            rng.offset <= now,
        kReseeded);
  draws->last = now;
  return static_cast<int64_t>(rng.offset - draws->first);
}

void Tape::on_op(const OpCall& call, FunctionRef<void()> execute) {
  for (const Tensor& out : call.outputs) {
    check(!out.defined() || out.device().is_cpu(), op_name(call.id), " on ", out.device(),
          " cannot be captured: captured steps run on the CPU");
  }
  if (recording_ == Recording::Running) {
    // Kernels that call ops themselves are one op on the tape.
    const Scoped<Consumer*> off(thread_state.consumer, nullptr);
    execute();
  }
  auto recorded = make_ref<Call>();
  recorded->id = call.id;
  recorded->phase = phase_of(call.id);
  recorded->args.assign(call.args.begin(), call.args.end());
  const auto is_output = [&](const Tensor& tensor) {
    return tensor.defined() &&
           std::any_of(call.outputs.begin(), call.outputs.end(), [&](const Tensor& out) {
             return out.defined() && out.storage() == tensor.storage();
           });
  };
  const bool view = recorded->is_view = !is_in_place(call.id) && !call.args.empty() &&
                                        std::holds_alternative<Tensor>(call.args[0]) &&
                                        is_output(std::get<Tensor>(call.args[0]));
  for_each_tensor(recorded->args, [&](Tensor& tensor) {
    recorded->inputs.push_back(slot_of(tensor, !view && is_output(tensor)));
    tensor = Tensor();
  });
  for (const Tensor& out : call.outputs) recorded->outputs.push_back(slot_of(out, !view));
  const Device device =
      !call.outputs.empty() && call.outputs[0].defined() ? call.outputs[0].device() : Device{};
  for (const Value& value : recorded->args) {
    if (const auto* rng = std::get_if<PhiloxArgs>(&value))
      recorded->random_offset = relative_offset(*rng, device);
  }
  if (const Source* source = source_()) {
    const auto same = [&](const Source& s) {
      return s.line == source->line && s.file == source->file && s.function == source->function;
    };
    const auto found = std::find_if(sources_.rbegin(), sources_.rend(), same);
    recorded->source = static_cast<int>(sources_.rend() - found) - 1;
    if (recorded->source < 0) {
      recorded->source = static_cast<int>(sources_.size());
      sources_.push_back(*source);
    }
  }
  calls_.push_back(std::move(recorded));
  release_unused();
}

void Tape::on_gradient(const Tensor& leaf) {
  const auto same = [&](const Tensor& known) { return known.is_same(leaf); };
  if (std::none_of(leaves_.begin(), leaves_.end(), same)) leaves_.push_back(leaf);
}

void Tape::on_host_read(const Tensor& tensor, const char* what) {
  const Source* source = source_();
  fail(ErrorKind::Runtime, what, " of a tensor of ", tensor.sizes(), " ", tensor.dtype(), " on ",
       tensor.device(),
       " cannot be captured: the host would read its value once, and every replay ",
       "would go on with that. Return the tensor from the captured function and read it outside",
       source ? str(", at ", source->file, ":", source->line, " in ", source->function) : "");
}

uint32_t Tape::references(const Storage& storage) const {
  return known_.contains(&storage) ? 1 : 0;
}

void Tape::release_unused() {
  std::erase_if(open_, [&](int index) {
    const Ref<Storage>& storage = storages_[static_cast<size_t>(index)].storage;
    // The tape's is the only reference: nobody can reach the bytes again.
    if (storage->use_count() != 1) return false;
    storage->replace({});
    return true;
  });
}

void Tape::start() {
  check(thread_state.consumer == nullptr,
        "a recording is already active on this thread: captured steps do not nest");
  thread_state.consumer = this;
  set_storage_observer(this);
  start_ = {default_generator(Device{})->seed(), default_generator(Device{})->offset()};
  active_ = true;
}

void Tape::stop() {
  check(active_ && thread_state.consumer == this, "this tape is not recording on this thread");
  thread_state.consumer = nullptr;
  set_storage_observer(nullptr);
  born_.clear();
  active_ = false;
  if (recording_ == Recording::Dry) give_numbers_back();
  find_escapes();
}

void Tape::give_numbers_back() {
  for (const Draws& draws : draws_)
    default_generator(draws.device)->set_state(draws.seed, draws.first);
}

void Tape::find_escapes() {
  // Leaves of the step's own (inputs of a gradient penalty, say) are gone, with their gradients.
  std::erase_if(leaves_, [](const Tensor& leaf) { return leaf.ref()->use_count() == 1; });
  release_unused();
  for (StorageRecord& record : storages_) record.escapes = false;
  for (const int index : open_) storages_[static_cast<size_t>(index)].escapes = true;
}

int Tape::find(const Tensor& tensor) const {
  const auto found = known_.find(tensor.storage().get());
  return found == known_.end() ? -1 : found->second;
}

uint64_t Tape::counters(Device device) const {
  for (const Draws& draws : draws_) {
    if (draws.device == device) return draws.last - draws.first;
  }
  return 0;
}

std::vector<Device> Tape::random_devices() const {
  std::vector<Device> devices;
  for (const Draws& draws : draws_) devices.push_back(draws.device);
  return devices;
}

Tensor Tape::tensor(int slot) const {
  const Slot& wanted = slots_.at(static_cast<size_t>(slot));
  const StorageRecord& record = storages_[static_cast<size_t>(wanted.storage)];
  auto impl = make_ref<TensorImpl>(record.storage, wanted.dtype, record.device);
  impl->set_geometry(wanted.sizes, wanted.strides, wanted.offset);
  return Tensor(std::move(impl));
}

}  // namespace vt::graphs
