#include "cuda/graph.h"

#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "core/host_wait.h"
#include "core/rebinding.h"
#include "cuda/allocator.h"
#include "cuda/allocator/retired.h"
#include "cuda/allocator/staging_ring.h"
#include "cuda/capture_gate.h"
#include "cuda/error.h"
#include "cuda/graph_capture.h"
#include "cuda/graph_chains.h"
#include "cuda/graph_transfers.h"
#include "cuda/stream.h"
#include "cuda/sync.h"
#include "graphs/lowering.h"

namespace vt::cuda {
namespace {

using graphs::DeviceProgram;
using graphs::Instruction;
using graphs::PoolHandle;

RetiredList& retired() {
  static auto* list = new RetiredList;  // graphs may outlive static objects
  return *list;
}

// --- pools

/// A pool as all graphs that name it share it: one of them runs at a time.
struct SharedPool {
  SharedPool(int device, MempoolId id) : allocator(device_allocator(device)), id(id) {
    allocator.hold_pool(id);
  }
  ~SharedPool() {
    arena.reset();
    allocator.release_pool(id);
  }
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;

  /// Makes `stream` wait for the last run if that was on another one.
  void order(StreamHandle stream) const {
    if (last_run && last_stream != stream) last_run->order(stream);
  }

  /// Sets memory of the pool to zero, before all runs to come.
  void clear(const Stream& stream, const Storage& memory) {
    const std::lock_guard lock(mutex);
    order(stream.handle);
    check_cuda(cudaMemsetAsync(memory.data(), 0, memory.nbytes(), stream.handle),
               "preparing a captured step");
    auto event = std::make_shared<DeviceEvent>(driver_of(stream.device));
    event->record(stream.handle);
    last_run = std::move(event);
    last_stream = stream.handle;
  }

  CachingAllocator& allocator;
  const MempoolId id;
  std::mutex mutex;  // guards what follows
  Ref<Storage> arena;
  std::shared_ptr<DeviceEvent> last_run;
  StreamHandle last_stream = nullptr;
};

std::shared_ptr<SharedPool> shared_pool(int device, MempoolId id) {
  static std::mutex mutex;
  static auto* known = new std::map<std::pair<int, MempoolId>, std::weak_ptr<SharedPool>>;
  const std::lock_guard lock(mutex);
  std::weak_ptr<SharedPool>& found = (*known)[{device, id}];
  std::shared_ptr<SharedPool> pool = found.lock();
  if (!pool) {
    found = pool = std::make_shared<SharedPool>(device, id);
    std::erase_if(*known, [](const auto& entry) { return entry.second.expired(); });
  }
  return pool;
}

// From this size on memory of the recording, which the allocator still has, would double the peak.
constexpr size_t kLargeArena = size_t{64} << 20;

class GraphPool final : public graphs::Pool {
 public:
  GraphPool(Device device, std::shared_ptr<SharedPool> shared)
      : Pool(device), shared_(std::move(shared)) {}

  PoolHandle handle() const override { return {shared_->id.first, shared_->id.second}; }
  Allocation allocate(size_t nbytes) override {
    const int device = this->device().index;
    CachingAllocator& allocator = shared_->allocator;
    if (nbytes >= kLargeArena) {
      const HostWait waiting;
      allocator.empty_cache();
    }
    allocator.begin_allocate_to_pool(shared_->id, AllocationRoute::this_thread());
    struct End {
      SharedPool& pool;
      ~End() { pool.allocator.end_allocate_to_pool(pool.id); }
    } const end{*shared_};
    return allocator.allocate(nbytes, current_stream(device).handle);
  }
  Ref<Storage> arena(size_t nbytes) override {
    retired().collect();  // a graph that was run once has memory of its own: its results
    Ref<Storage> small;   // given back for the new one to take, unless a graph still uses it
    {
      const std::lock_guard lock(shared_->mutex);
      if (shared_->arena && shared_->arena->nbytes() >= nbytes) return shared_->arena;
      small = std::move(shared_->arena);
    }
    small.reset();
    // No lock here: where memory is short the allocator asks code of the user.
    Ref<Storage> made = make_ref<Storage>(allocate(nbytes), device());
    const std::lock_guard lock(shared_->mutex);
    if (!shared_->arena || shared_->arena->nbytes() < nbytes) shared_->arena = made;
    return made;
  }
  SharedPool& shared() const { return *shared_; }

 private:
  std::shared_ptr<SharedPool> shared_;
};

// --- the program

/// A graph and all that it uses.
struct Captured {
  int device = 0;
  CapturedGraph graph;
  std::vector<Instruction> calls;           // holds the tensors
  std::vector<graphs::Transfer> transfers;  // these too
  Ref<Storage> control;
  Ref<Storage> turn;  // whose turn it is among the ring's slots; null: runs are brought the block
  Ref<graphs::Pool> pool;
  std::unique_ptr<StagingRing> ring;
  std::vector<std::pair<const Storage*, const void*>> addresses;
  uint64_t rebindings_seen = 0;  // when they were right last

  SharedPool& shared() const { return static_cast<GraphPool&>(*pool).shared(); }
};

void add_address(std::map<const Storage*, const void*>& found, const Tensor& tensor) {
  if (tensor.defined() && !tensor.device().is_cpu())
    found.emplace(tensor.storage().get(), tensor.storage()->data());
}

std::vector<std::pair<const Storage*, const void*>> addresses_of(
    const std::vector<Instruction>& calls) {
  std::map<const Storage*, const void*> found;
  for (const Instruction& call : calls) {
    for (const Value& value : call.args) {
      if (const auto* tensor = std::get_if<Tensor>(&value)) {
        add_address(found, *tensor);
      } else if (const auto* list = std::get_if<std::vector<Tensor>>(&value)) {
        for (const Tensor& item : *list) add_address(found, item);
      }
    }
    for (const Tensor& out : call.outputs) add_address(found, out);
  }
  return {found.begin(), found.end()};
}

class GraphProgram final : public DeviceProgram {
 public:
  explicit GraphProgram(std::shared_ptr<Captured> captured) : captured_(std::move(captured)) {}
  ~GraphProgram() override {
    try {
      retired().add(captured_->ring->last(), captured_);
    } catch (const Error&) {
      // The process is exiting, and the driver is gone.
    }
  }

  void extend() override {
    const Stream stream = current_stream(captured_->device);
    const std::lock_guard lock(captured_->shared().mutex);
    captured_->ring->extend(stream.handle);
  }
  void join() override {
    const Stream stream = current_stream(captured_->device);
    SharedPool& pool = captured_->shared();
    const std::lock_guard lock(pool.mutex);
    pool.order(stream.handle);
  }
  std::byte* control() override {
    check_runnable();
    return slot_ = captured_->ring->current();
  }
  void launch() override;
  std::vector<size_t> nodes() const override { return captured_->graph.nodes; }
  std::map<std::string, size_t> node_kinds() const override { return captured_->graph.kinds(); }
  void dump(const std::string& path) const override {
    check_cuda(
        cudaGraphDebugDotPrint(captured_->graph.graph, path.c_str(), cudaGraphDebugDotFlagsVerbose),
        str("writing a graph to ", path));
  }

 private:
  void check_runnable();

  std::shared_ptr<Captured> captured_;
  std::byte* slot_ = nullptr;  // of the run to come
};

void GraphProgram::check_runnable() {
  if (const uint64_t now = rebindings.load(std::memory_order_acquire);
      captured_->rebindings_seen != now) {
    for (const auto& [storage, data] : captured_->addresses) {
      check(storage->data() == data,
            "memory that a captured step is bound to has moved (a tensor was resized or its .data "
            "set); capture the step again");
    }
    captured_->rebindings_seen = now;
  }
  check(!is_captured(current_stream(captured_->device)),
        "a captured step cannot be replayed on a stream that is being captured");
}

void GraphProgram::launch() {
  Captured& c = *captured_;
  check(slot_ != nullptr, "launch() comes after control()");
  const Stream stream = current_stream(c.device);
  const DeviceGuard guard(c.device);
  retired().collect();
  SharedPool& pool = c.shared();
  const std::lock_guard lock(pool.mutex);
  // Runs that share memory, be it of one graph or of several, do not overlap.
  pool.order(stream.handle);
  if (!c.turn)
    check_cuda(cudaMemcpyAsync(c.control->data(), slot_, c.control->nbytes(),
                               cudaMemcpyHostToDevice, stream.handle),
               "uploading the control block of a captured step");
  const cudaError_t launched = cudaGraphLaunch(c.graph.executable, stream.handle);
  slot_ = nullptr;
  // A run that was not launched has not taken its turn, and its slot is the next one's.
  if (c.turn && launched != cudaSuccess) cuda_failed(launched, "launching a captured step");
  c.ring->sent(stream.handle);
  pool.last_run = c.ring->last();
  pool.last_stream = stream.handle;
  check_cuda(launched, "launching a captured step");
  if (launch_blocking) [[unlikely]]
    synchronize(stream);
}

// --- the lowering

// Up to here the device reads the block from the host's memory as the graph runs; a copy engine is
// faster with more.
constexpr size_t kFetched = size_t{16} << 10;

/// The stream on which a device's graphs are captured. One, so that graphs of one pool find each
/// other's memory there.
struct CaptureStream {
  std::mutex mutex;  // held while a graph is captured
  Stream stream;
};
CaptureStream& capture_stream(int device) {
  static auto* all = new std::array<CaptureStream, kMaxDevices>;
  return (*all)[static_cast<size_t>(device)];
}

/// The lock, waited for with what the embedding language holds let go of: while it is held memory
/// may be asked for, and a thread that has to wait for some lets go of that too.
std::unique_lock<std::mutex> lock_in_turn(std::mutex& mutex) {
  std::unique_lock lock(mutex, std::try_to_lock);
  if (!lock) {
    const HostWait waiting;
    lock.lock();
  }
  return lock;
}

ChainCompiler chain_compiler{};

class CudaLowering final : public graphs::Lowering {
 public:
  Ref<graphs::Pool> pool(Device device, PoolHandle wanted) override {
    const MempoolId id =
        wanted == PoolHandle{} ? new_mempool_id(false) : MempoolId{wanted.first, wanted.second};
    return make_ref<GraphPool>(device, shared_pool(device.index, id));
  }

  std::unique_ptr<DeviceProgram> lower(std::vector<Instruction> calls,
                                       std::vector<graphs::Transfer> transfers,
                                       Ref<Storage> control, Ref<graphs::Pool> pool) override {
    retired().collect();
    auto captured = std::make_shared<Captured>();
    Captured& c = *captured;
    c.device = pool->device().index;
    c.calls = std::move(calls);
    c.transfers = std::move(transfers);
    std::vector<TransferEntry> inputs, results;
    for (const graphs::Transfer& t : c.transfers)
      (t.before ? inputs : results)
          .push_back({static_cast<std::byte*>(t.place.data()), t.nbytes, t.address});
    c.control = std::move(control);
    c.pool = std::move(pool);
    const DeviceGuard guard(c.device);
    const Stream caller = current_stream(c.device);
    check(!is_captured(caller), "a step cannot be captured on a stream that is being captured");
    if (chain_compiler.prepare) chain_compiler.prepare(c.calls);
    c.rebindings_seen = rebindings.load(std::memory_order_acquire);
    c.addresses = addresses_of(c.calls);
    c.ring =
        std::make_unique<StagingRing>(driver_of(c.device), pinned_allocator(), c.control->nbytes());
    RunSlots slots;
    if (c.control->nbytes() <= kFetched) {
      c.turn = make_ref<Storage>(c.pool->allocate(sizeof(uint32_t)), c.pool->device());
      slots = {c.ring->data(), c.ring->pitch(), static_cast<uint32_t>(c.ring->slots()),
               static_cast<uint32_t*>(c.turn->data())};
      c.shared().clear(caller, *c.turn);
    }
    {
      const CaptureScope apart(c.device);
      CaptureStream& own = capture_stream(c.device);
      const std::unique_lock lock = lock_in_turn(own.mutex);
      auto* const control_block = static_cast<std::byte*>(c.control->data());
      c.graph.capture(
          own.stream, c.device, c.calls,
          [&](Stream stream) {
            begin_run(stream, control_block, c.control->nbytes(), slots, inputs);
          },
          [&](Stream stream) { end_run(stream, control_block, results); }, c.shared().allocator,
          c.shared().id);
    }
    c.graph.instantiate(caller);
    return std::make_unique<GraphProgram>(std::move(captured));
  }

  std::string chains_problem() override {
    return chain_compiler.problem ? chain_compiler.problem() : "no kernels for chains";
  }
};

}  // namespace

void install_lowering() {
  static auto* lowering = new CudaLowering;
  graphs::set_lowering(DeviceType::CUDA, lowering);
}

void set_chain_compiler(ChainCompiler compiler) { chain_compiler = compiler; }

size_t collect_graphs() { return retired().collect(); }

}  // namespace vt::cuda
