#include "graphs/tape.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "autograd/engine.h"
#include "core/rebinding.h"

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

/// Whether the tensor lies in the memory of one of the outputs.
bool is_output(const OpCall& call, const Tensor& tensor) {
  return tensor.defined() &&
         std::any_of(call.outputs.begin(), call.outputs.end(), [&](const Tensor& out) {
           return out.defined() && out.storage() == tensor.storage();
         });
}
bool is_view(const OpCall& call) {
  return !is_in_place(call.id) && !call.args.empty() &&
         std::holds_alternative<Tensor>(call.args[0]) &&
         is_output(call, std::get<Tensor>(call.args[0]));
}

/// Gives a storage that has none its bytes.
void provide(Storage& storage, size_t nbytes) {
  if (!storage.data() && nbytes > 0)
    storage.replace(allocator_for(storage.device().type).allocate(nbytes, storage.device()));
}

/// No observer of storages meanwhile.
class Unseen {
 public:
  Unseen() { set_storage_observer(nullptr); }
  ~Unseen() { set_storage_observer(before_); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;

 private:
  StorageObserver* before_ = storage_observer();
};

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

Tape::Tape(const Source* (*source)(), Recording recording, bool may_put_off)
    : source_(source), recording_(recording), may_put_off_(may_put_off) {
  check(!may_put_off || recording == Recording::Running, "a dry recording has nothing to put off");
}

int Tape::storage_of(const Tensor& tensor, Use use) {
  const Ref<Storage>& storage = tensor.storage();
  const auto [place, added] = known_.try_emplace(storage.get(), static_cast<int>(storages_.size()));
  if (added) {
    const auto born = born_.find(storage.get());
    StorageRecord record{
        .storage = storage, .nbytes = storage->nbytes(), .device = tensor.device()};
    record.blank = born != born_.end() && born->second == Origin::Blank;
    record.borrowed = born != born_.end() && born->second == Origin::Borrowed;
    record.host = record.borrowed || (born != born_.end() && born->second == Origin::Host);
    if (born == born_.end()) record.first = tensor;
    storages_.push_back(std::move(record));
    const auto blank = std::find(blanks_.rbegin(), blanks_.rend(), storage);
    if (blank != blanks_.rend()) blanks_.erase(std::next(blank).base());
  }
  StorageRecord& record = storages_[static_cast<size_t>(place->second)];
  const bool written = use == Use::Write;
  if (putting_off_ && use != Use::View) {
    record.touched = true;
    record.due |= written;
  }
  changed_state_ |= written && record.first.defined();
  if (record.blank && use != Use::View) {
    // Blank memory that is read first was filled by the host (a number as a tensor).
    record.blank = false;
    (written ? record.fresh : record.host) = true;
    if (written) open_.push_back(place->second);
  }
  check(!(written && record.host), "a tensor of ", tensor.sizes(), " ", tensor.dtype(),
        " that the captured function makes from host data is changed in place: every replay would "
        "go on from the changed values. Make it outside, or write x = x + 1 instead of x += 1");
  return place->second;
}

int Tape::slot_of(const Tensor& tensor, Use use) {
  if (!tensor.defined()) return -1;
  Slot slot{storage_of(tensor, use), tensor.storage_offset(), tensor.impl()->sizes,
            tensor.impl()->strides,  tensor.dtype(),          tensor.impl()->wrapped_number};
  slots_.push_back(std::move(slot));
  return static_cast<int>(slots_.size()) - 1;
}

bool Tape::bytes_later(Device device) const {
  const bool later = putting_off_ || recording_ == Recording::Dry;
  return later && !paused_ && !device.is_cpu();
}

void Tape::bytes_wanted(Storage& storage) {
  const auto found = known_.find(&storage);
  if (found != known_.end() && storages_[static_cast<size_t>(found->second)].touched) catch_up();
  provide(storage, storage.nbytes());
}

void Tape::allocated(Storage& storage) {
  if (!storage.data() && storage.nbytes() > 0) blanks_.push_back(Ref<Storage>(&storage));
  if (paused_) {
    born_.erase(&storage);
  } else {
    born_[&storage] = Origin::Blank;
  }
}
void Tape::host_written(const Storage& storage, bool borrowed) {
  // While paused, what an earlier storage at this address was is past.
  if (paused_) {
    born_.erase(&storage);
  } else {
    born_[&storage] = borrowed ? Origin::Borrowed : Origin::Host;
  }
}

bool Tape::host_made(const Tensor& tensor) const {
  const auto born = born_.find(tensor.storage().get());
  return born != born_.end() && born->second == Origin::Host;
}

void Tape::gradient_changes(const Tensor& tensor, const Tensor& before) {
  const auto same = [&](const auto& known) { return known.first.is_same(tensor); };
  if (std::none_of(gradients_.begin(), gradients_.end(), same))
    gradients_.emplace_back(tensor, before);
}

void Tape::tensor_changes(const Tensor& tensor) {
  const TensorImpl* impl = tensor.impl();
  // What the recording makes is its own affair.
  if (paused_ || born_.contains(impl->storage.get())) return;
  const auto same = [&](const Before& known) { return known.tensor.is_same(tensor); };
  if (std::any_of(changed_.begin(), changed_.end(), same)) return;
  Before before{.tensor = tensor,
                .storage = impl->storage,
                .sizes = impl->sizes,
                .strides = impl->strides,
                .offset = impl->offset,
                .dtype = impl->dtype,
                .device = impl->device,
                .version = impl->version,
                .own_version = impl->own_version,
                .requires_grad = impl->requires_grad,
                .grad_fn = {},
                .output_nr = 0,
                .view_version = 0};
  if (const autograd::AutogradMeta* meta = impl->autograd.get()) {
    before.grad_fn = meta->grad_fn;
    before.output_nr = meta->output_nr;
    before.view_version = meta->view_version;
  }
  changed_.push_back(std::move(before));
}

void Tape::put_back_tensors() {
  for (Before& before : std::exchange(changed_, {})) {
    TensorImpl* impl = before.tensor.impl();
    impl->storage = std::move(before.storage);
    impl->dtype = before.dtype;
    impl->device = before.device;
    impl->set_geometry(before.sizes, before.strides, before.offset);
    impl->version = before.version;
    impl->own_version = std::move(before.own_version);
    impl->requires_grad = before.requires_grad;
    if (autograd::AutogradMeta* meta = impl->autograd.get()) {
      meta->grad_fn = std::move(before.grad_fn);
      meta->output_nr = before.output_nr;
      meta->view_version = before.view_version;
    }
    note_rebinding();
  }
}

int64_t Tape::relative_offset(const PhiloxArgs& rng, Device device) {
  // One of its own may stand where the default one does.
  check(own_draws() == own_draws_, kReseeded);
  const Generator& generator = default_generator(device);
  const uint64_t now = generator->offset();
  auto draws = std::find_if(draws_.begin(), draws_.end(),
                            [&](const Draws& d) { return d.device == device; });
  if (draws == draws_.end()) {
    const auto start = std::find_if(starts_.begin(), starts_.end(),
                                    [&](const Start& s) { return s.device == device; });
    check(start == starts_.end() ||
              (rng.seed == start->numbers.seed && rng.offset == start->numbers.offset),
          kReseeded);
    draws_.push_back({device, generator->seed(), rng.offset, rng.offset});
    draws = draws_.end() - 1;
  }
  check(rng.seed == generator->seed() && rng.seed == draws->seed && rng.offset == draws->last &&
            rng.offset <= now,
        kReseeded);
  draws->last = now;
  return static_cast<int64_t>(rng.offset - draws->first);
}

void Tape::check_devices(const OpCall& call) {
  const auto seen = [&](const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().is_cpu()) return false;
    if (!device_) device_ = tensor.device();
    check(tensor.device() == *device_, op_name(call.id), " uses a tensor of ", tensor.sizes(),
          " on ", tensor.device(), ", and this captured step began on ", *device_,
          ": a step runs on one device");
    return true;
  };
  bool reads = false, writes_host = false;
  for_each_tensor(call.args, [&](const Tensor& tensor) { reads = seen(tensor) || reads; });
  for (const Tensor& out : call.outputs) {
    if (out.defined() && !seen(out)) writes_host = true;
  }
  if (!reads || !writes_host) return;
  const Source* source = source_();
  fail(
      op_name(call.id), " from ", *device_,
      " to the CPU cannot be captured: the host would have to wait for the device in the middle of "
      "the step. Return the tensor from the captured function and copy it outside",
      source ? str(", at ", source->file, ":", source->line, " in ", source->function) : "");
}

void Tape::on_op(const OpCall& call, FunctionRef<void()> execute) {
  try {
    record(call, execute);
  } catch (const Error& error) {
    remember(error.what());
    throw;
  } catch (...) {
    remember(op_name(call.id));
    throw;
  }
}

void Tape::remember(std::string_view failure) {
  if (failure_.empty()) failure_ = failure;
}

void Tape::record(const OpCall& call, FunctionRef<void()> execute) {
  check_devices(call);
  if (may_put_off_ && !putting_off_ && device_ && !changed_state_) {
    putting_off_ = true;
    first_put_off_ = calls_.size();
  }
  if (recording_ == Recording::Running && !putting_off_) {
    // Kernels that call ops themselves are one op on the tape.
    const Scoped<Consumer*> off(thread_state.consumer, nullptr);
    execute();
  }
  auto recorded = make_ref<Call>();
  recorded->id = call.id;
  recorded->phase = phase_of(call.id);
  recorded->args.assign(call.args.begin(), call.args.end());
  const bool view = recorded->is_view = is_view(call);
  for_each_tensor(recorded->args, [&](Tensor& tensor) {
    const Use use = view ? Use::View : is_output(call, tensor) ? Use::Write : Use::Read;
    recorded->inputs.push_back(slot_of(tensor, use));
    tensor = Tensor();
  });
  for (const Tensor& out : call.outputs)
    recorded->outputs.push_back(slot_of(out, view ? Use::View : Use::Write));
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

void Tape::catch_up() {
  may_put_off_ = false;
  if (!putting_off_) return;
  putting_off_ = false;
  const Scoped<Consumer*> off(thread_state.consumer, nullptr);
  const Scoped<bool> no_grad(thread_state.grad_enabled, false);
  const Unseen unseen;
  try {
    run_put_off();
  } catch (...) {
    provide_survivors();
    throw;
  }
  provide_survivors();
}

void Tape::run_put_off() {
  const auto storage_at = [&](int slot) {
    return static_cast<size_t>(slots_[static_cast<size_t>(slot)].storage);
  };
  const auto for_each_storage = [&](const Call& call, const auto& f) {
    for (const auto* slots : {&call.inputs, &call.outputs}) {
      for (const int slot : *slots) {
        if (slot >= 0) f(storage_at(slot));
      }
    }
  };
  std::vector<size_t> last(storages_.size(), 0);
  for (size_t i = first_put_off_; i < calls_.size(); ++i)
    for_each_storage(*calls_[i], [&](size_t storage) { last[storage] = i; });
  for (size_t i = first_put_off_; i < calls_.size(); ++i) {
    const Call& call = *calls_[i];
    if (!call.is_view) {
      std::vector<Tensor> inputs, outputs;
      for (const int slot : call.inputs) inputs.push_back(slot < 0 ? Tensor() : tensor(slot));
      for (const int slot : call.outputs) outputs.push_back(slot < 0 ? Tensor() : tensor(slot));
      const KernelSwitchesAs switches(call.switches);
      execute_kernel(call.id, call.bind(inputs), outputs);
    }
    for_each_storage(call, [&](size_t index) {
      const StorageRecord& record = storages_[index];
      if (last[index] == i && record.fresh && record.storage->use_count() == 1)
        record.storage->replace({});
    });
  }
}

/// What somebody still refers to has bytes, even if the op that was to write them has failed.
void Tape::provide_survivors() noexcept {
  const auto settle = [](const Ref<Storage>& storage, size_t nbytes) {
    if (storage->use_count() == 1) {
      storage->replace({});
      return;
    }
    try {
      provide(*storage, nbytes);
    } catch (const Error&) {
      // Out of memory: an access will say that the storage is too small.
      storage->replace({});
    }
  };
  for (const StorageRecord& record : storages_) {
    if (record.fresh) settle(record.storage, record.nbytes);
  }
  for (const Ref<Storage>& storage : blanks_) settle(storage, storage->nbytes());
  blanks_.clear();
}

void Tape::hand_over() {
  check(putting_off_ && !active_, "only a recording that has ended hands over what it has put off");
  putting_off_ = may_put_off_ = false;
  give_numbers_back();
  for (const StorageRecord& record : storages_) {
    if (record.fresh && record.storage->use_count() == 1) record.storage->replace({});
  }
}

StorageRecord* Tape::known(const Tensor& tensor) {
  const int index = tensor.defined() ? find(tensor) : -1;
  return index < 0 ? nullptr : &storages_[static_cast<size_t>(index)];
}

void Tape::Paused::on_op(const OpCall& call, FunctionRef<void()> execute) {
  if (!is_view(call)) {
    bool waits = false;
    for_each_tensor(call.args, [&](const Tensor& tensor) {
      const StorageRecord* record = tape_.known(tensor);
      waits = waits || (record && record->due);
    });
    for (const Tensor& out : call.outputs) {
      const StorageRecord* record = tape_.known(out);
      waits = waits || (record && record->touched);
    }
    if (waits) tape_.catch_up();
    for_each_tensor(call.args, [](const Tensor& tensor) {
      if (tensor.defined()) provide(*tensor.storage(), tensor.storage()->nbytes());
    });
  }
  const Scoped<Consumer*> off(thread_state.consumer, nullptr);
  execute();
}

void Tape::Paused::on_host_read(const Tensor& tensor, const char*) {
  tape_.bytes_wanted(*tensor.storage());
}

void Tape::on_gradient(const Tensor& leaf) {
  const auto same = [&](const Tensor& known) { return known.is_same(leaf); };
  if (std::none_of(leaves_.begin(), leaves_.end(), same)) leaves_.push_back(leaf);
}

void Tape::on_host_read(const Tensor& tensor, const char* what) {
  const Source* source = source_();
  const std::string message =
      str(what, " of a tensor of ", tensor.sizes(), " ", tensor.dtype(), " on ", tensor.device(),
          " cannot be captured: the host would read its value once, and every replay ",
          "would go on with that. Return the tensor from the captured function and read it outside",
          source ? str(", at ", source->file, ":", source->line, " in ", source->function) : "");
  remember(message);
  fail(message);
}

uint32_t Tape::references(const Storage& storage) const {
  if (known_.contains(&storage)) return 1;
  const auto same = [&](const Ref<Storage>& blank) { return blank.get() == &storage; };
  return std::any_of(blanks_.begin(), blanks_.end(), same) ? 1 : 0;
}

void Tape::release_unused() {
  std::erase_if(open_, [&](int index) {
    const Ref<Storage>& storage = storages_[static_cast<size_t>(index)].storage;
    // The tape's is the only reference: nobody can reach the bytes again.
    if (storage->use_count() != 1) return false;
    // Ops that were put off may have to use it yet.
    if (!putting_off_) storage->replace({});
    return true;
  });
}

void Tape::start() {
  check(thread_state.consumer == nullptr,
        "a recording is already active on this thread: captured steps do not nest");
  thread_state.consumer = this;
  set_storage_observer(this);
  starts_.clear();
  own_draws_ = own_draws();
  for (const Generator* generator : default_generators())
    starts_.push_back({(*generator)->device(), (*generator)->state()});
  if (recording_ == Recording::Dry) autograd::set_gradient_observer(this);
  active_ = true;
}

void Tape::stop() {
  check(active_ && thread_state.consumer == this, "this tape is not recording on this thread");
  thread_state.consumer = nullptr;
  set_storage_observer(nullptr);
  autograd::set_gradient_observer(nullptr);
  born_.clear();
  active_ = false;
  for (const Ref<Storage>& storage : std::exchange(blanks_, {})) {
    if (storage->use_count() > 1) provide(*storage, storage->nbytes());
  }
  find_escapes();
  if (recording_ != Recording::Dry) return;
  give_numbers_back();
  for (const StorageRecord& record : storages_) {
    if (record.escapes) provide(*record.storage, record.nbytes);
  }
}

void Tape::pause() {
  check(active() == this, "this tape is not recording on this thread");
  const bool owes_bytes = putting_off_ || (recording_ == Recording::Dry && device_);
  thread_state.consumer = owes_bytes ? &while_paused_ : nullptr;
  paused_ = true;
}

void Tape::resume() {
  check(paused_ && (!thread_state.consumer || thread_state.consumer == &while_paused_),
        "this tape is not paused on this thread");
  thread_state.consumer = this;
  paused_ = false;
}

Tape* Tape::active() { return dynamic_cast<Tape*>(thread_state.consumer); }

void Tape::give_numbers_back() {
  for (const Draws& draws : draws_)
    default_generator(draws.device)->set_state(draws.seed, draws.first);
}

void Tape::find_escapes() {
  // Leaves of the step's own (inputs of a gradient penalty, say) are gone, with their gradients:
  // those that lists of the tape alone hold.
  std::unordered_map<const TensorImpl*, uint32_t> held;
  for (const Tensor& leaf : leaves_) ++held[leaf.impl()];
  for (const auto& gradient : gradients_) ++held[gradient.first.impl()];
  for (const Before& before : changed_) ++held[before.tensor.impl()];
  std::erase_if(held, [](const auto& of) { return of.first->use_count() != of.second; });
  const auto gone = [&](const Tensor& leaf) { return held.contains(leaf.impl()); };
  std::erase_if(leaves_, gone);
  std::erase_if(gradients_, [&](const auto& gradient) { return gone(gradient.first); });
  std::erase_if(changed_, [&](const Before& before) { return gone(before.tensor); });
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
  provide(*record.storage, record.nbytes);
  auto impl = make_ref<TensorImpl>(record.storage, wanted.dtype, record.device);
  impl->set_geometry(wanted.sizes, wanted.strides, wanted.offset);
  impl->wrapped_number = wanted.number;
  return Tensor(std::move(impl));
}

}  // namespace vt::graphs
