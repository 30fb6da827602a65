#include "core/block_cache.h"

#include <cstdlib>
#include <new>

namespace vt {
namespace {

constexpr size_t kGranule = 64;
constexpr size_t kClasses = 9;     // sizes up to 512 bytes
constexpr int kMaxPerClass = 256;  // bounds what an idle thread holds on to

struct Block {
  Block* next;
};

struct Cache {
  Block* head[kClasses] = {};
  int count[kClasses] = {};
  bool closed = false;
  ~Cache() {
    closed = true;
    for (Block*& list : head) {
      while (list) {
        Block* next = list->next;
        std::free(list);
        list = next;
      }
    }
  }
};

thread_local Cache cache;

}  // namespace

void* block_cache_allocate(size_t size) {
  const size_t index = (size + kGranule - 1) / kGranule;
  if (index < kClasses) {
    if (Block* block = cache.head[index]) {
      cache.head[index] = block->next;
      --cache.count[index];
      return block;
    }
    size = index * kGranule;
  }
  void* pointer = std::malloc(size);
  if (!pointer) throw std::bad_alloc();
  return pointer;
}

void block_cache_release(void* pointer, size_t size) noexcept {
  const size_t index = (size + kGranule - 1) / kGranule;
  if (index < kClasses && !cache.closed && cache.count[index] < kMaxPerClass) {
    auto* block = static_cast<Block*>(pointer);
    block->next = cache.head[index];
    cache.head[index] = block;
    ++cache.count[index];
    return;
  }
  std::free(pointer);
}

}  // namespace vt
