// What capture mode records of a run: every op that passes the consumer point, with its arguments,
// on which storage each tensor lies, the phase of the step and the Python line. The ops run as they
// are recorded, or not at all (a dry recording). The tape keeps storages, not tensors: what nothing
// else refers to any more gives its bytes back at once, so that recording needs little more memory
// than running.
//
// A running recording may put its ops off: from the first op of an accelerator on they only pass,
// and what they make there has no bytes. Whoever recorded then either has a program do all of them,
// in memory that is planned, or lets the tape run them one by one (catch_up), as if they had run in
// their time. The tape does so by itself where somebody is about to look at what is not there yet.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "autograd/gradient_observer.h"
#include "autograd/node.h"
#include "core/generator.h"
#include "core/kernel_switches.h"
#include "core/storage_observer.h"
#include "dispatch/consumer.h"

namespace vt::graphs {

enum class Phase : uint8_t { Forward, Backward, Optimizer };

/// A line of the program that is recorded.
struct Source {
  std::string file, function;
  int line = 0;
};

/// A tensor of the tape: a geometry on one of its storages.
struct Slot {
  int storage = -1;
  int64_t offset = 0;  // elements
  Dims sizes, strides;
  DType dtype = DType::Float32;
  bool number = false;  // a Python number: it promotes as one
};

/// One recorded op. The tensors among its arguments are indices of slots, in the order of the
/// schema, -1 for one that is undefined; `args` keeps everything else.
struct Call final : RefCounted {
  OpId id{};
  std::vector<Value> args;
  std::vector<int> inputs;
  std::vector<int> outputs;
  Phase phase = Phase::Forward;
  bool is_view = false;  // it only names memory: nothing runs for it
  int source = -1;
  /// Counters it draws, from the start of the recording; -1 for none.
  int64_t random_offset = -1;
  uint32_t switches = kernel_switches();  // what its kernel sees, whenever it runs

  /// The arguments with these tensors in place of the slots.
  std::vector<Value> bind(TensorSpan tensors) const;
};

struct StorageRecord {
  Ref<Storage> storage;
  size_t nbytes = 0;
  Device device;
  Tensor first;        // the tensor that brought it onto the tape, if it was there before
  bool blank = false;  // made by the recording, and so far nobody's: no op has read or written it
  bool fresh = false;  // made by the recording, from uninitialised memory
  bool host = false;   // made by the recording, with values of the host
  bool borrowed = false;  // those are somebody else's, who may change them
  bool escapes = false;   // still in use by others when the recording ended
  bool touched = false;   // an op that was put off reads or writes it
  bool due = false;       // one of those writes it
};

/// Whether the ops of a recording run. Dry, they only pass: tensors keep their values, results have
/// memory without values, and random numbers are where they were when it ends. On an accelerator
/// what they make has memory only if it outlives the recording.
enum class Recording : uint8_t { Running, Dry };

class Tape final : public Consumer,
                   public StorageObserver,
                   public autograd::GradientObserver,
                   public RefCounted {
 public:
  /// `source` gives the line that is running, or null; it is called once an op. may_put_off: of a
  /// running recording.
  explicit Tape(const Source* (*source)(), Recording recording = Recording::Running,
                bool may_put_off = false);

  void on_op(const OpCall& call, FunctionRef<void()> execute) override;
  void on_gradient(const Tensor& leaf) override;
  void on_host_read(const Tensor& tensor, const char* what) override;
  uint32_t references(const Storage& storage) const override;
  void allocated(Storage& storage) override;
  void host_written(const Storage& storage, bool borrowed) override;
  bool bytes_later(Device device) const override;
  void bytes_wanted(Storage& storage) override;
  void gradient_changes(const Tensor& tensor, const Tensor& before) override;
  void tensor_changes(const Tensor& tensor) override;
  /// Records on this thread from now on; recordings do not nest.
  void start();
  /// Ends the recording and finds the storages that others still use.
  void stop();
  /// Whether ops have been recorded that have not run: a program, or catch_up(), is to run them.
  bool puts_off() const { return putting_off_; }
  /// Runs what has been put off, and from now on every op at once. It may be called when the
  /// recording has ended, too. Throws what an op throws; those before it are done then, and none
  /// after it.
  void catch_up();
  /// After the recording: a program is about to run what has been put off. Random numbers are where
  /// they were, and nothing is left to catch up with.
  void hand_over();
  /// Until resume(), ops run as if nothing were recorded; what they make was there before.
  void pause();
  void resume();
  /// What the first op or read that failed said; empty if none did. A function that goes on after
  /// an error took a way that replays could not know of.
  const std::string& failure() const { return failure_; }
  /// Finds them again, as after a garbage collection.
  void find_escapes();

  const std::vector<Ref<Call>>& calls() const { return calls_; }
  const std::vector<Slot>& slots() const { return slots_; }
  const std::vector<StorageRecord>& storages() const { return storages_; }
  const std::vector<Source>& sources() const { return sources_; }
  /// Leaves whose .grad backward set or added to, or the program looked at, in order. Once the tape
  /// has stopped: those that somebody else holds.
  const std::vector<Tensor>& leaves() const { return leaves_; }
  /// Of a dry recording: tensors whose .grad it changed, each with that of before (maybe
  /// undefined).
  const std::vector<std::pair<Tensor, Tensor>>& gradients_before() const { return gradients_; }
  /// Of a dry recording that has ended: tensors that were there before mean the memory that they
  /// meant before, with the history and leaf flag of then.
  void put_back_tensors();
  void forget_gradients_before() {
    gradients_.clear();
    changed_.clear();
  }
  Recording recording() const { return recording_; }
  /// The tape that records on this thread, or null.
  static Tape* active();
  /// While recording: whether the function has filled the tensor's storage with data of the host's;
  /// not where it shares memory with an array.
  bool host_made(const Tensor& tensor) const;
  /// Index of the tensor's storage, -1 if the recording has not seen it.
  int find(const Tensor& tensor) const;
  /// Counters that were drawn from a device's default generator.
  uint64_t counters(Device device) const;
  /// Devices whose default generator was drawn from.
  std::vector<Device> random_devices() const;
  /// A tensor on a storage of the tape, for inputs and state. It must still have its bytes.
  Tensor tensor(int slot) const;

 private:
  /// Stands where the tape stood while it is paused and has put ops off: others run after those
  /// that they have to do with.
  class Paused final : public Consumer {
   public:
    explicit Paused(Tape& tape) : tape_(tape) {}
    void on_op(const OpCall& call, FunctionRef<void()> execute) override;
    void on_host_read(const Tensor& tensor, const char* what) override;

   private:
    Tape& tape_;
  };

  struct Draws {
    Device device;
    uint64_t seed, first, last;
  };
  struct Start {  // where a device's numbers were
    Device device;
    PhiloxArgs numbers;
  };
  enum class Origin : uint8_t { Blank, Host, Borrowed };
  struct Before {  // what a tensor was, besides its values
    Tensor tensor;
    Ref<Storage> storage;
    Dims sizes, strides;
    int64_t offset;
    DType dtype;
    Device device;
    std::atomic<uint32_t>* version;
    Ref<VersionCounter> own_version;
    bool requires_grad;
    Ref<autograd::Node> grad_fn;
    uint32_t output_nr, view_version;
  };

  void check_devices(const OpCall& call);
  void record(const OpCall& call, FunctionRef<void()> execute);
  void remember(std::string_view failure);
  enum class Use : uint8_t { View, Read, Write };
  int storage_of(const Tensor& tensor, Use use);
  int slot_of(const Tensor& tensor, Use use);
  int64_t relative_offset(const PhiloxArgs& rng, Device device);
  void release_unused();
  void give_numbers_back();
  StorageRecord* known(const Tensor& tensor);
  void run_put_off();
  void provide_survivors() noexcept;

  const Source* (*source_)();
  Recording recording_;
  bool active_ = false;
  bool paused_ = false;
  bool may_put_off_;
  bool putting_off_ = false;
  bool changed_state_ = false;  // an op has written to what was there before
  size_t first_put_off_ = 0;    // of calls_
  Paused while_paused_{*this};
  std::vector<Ref<Storage>> blanks_;  // without bytes, and no op has touched them
  std::string failure_;
  std::vector<Ref<Call>> calls_;
  std::vector<Slot> slots_;
  std::vector<StorageRecord> storages_;
  std::vector<Source> sources_;
  std::unordered_map<const Storage*, int> known_;
  std::vector<Tensor> leaves_;
  std::vector<std::pair<Tensor, Tensor>> gradients_;
  std::vector<Before> changed_;
  std::vector<int> open_;  // fresh storages that have their bytes
  std::vector<Draws> draws_;
  std::vector<Start> starts_;
  uint64_t own_draws_ = 0;                           // before the recording
  std::optional<Device> device_;                     // of what is not on the CPU
  std::unordered_map<const Storage*, Origin> born_;  // while recording; addresses may repeat
};

}  // namespace vt::graphs
