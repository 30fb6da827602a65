#include "core/generator.h"

namespace vt {

uint64_t GeneratorImpl::seed() const {
  const std::lock_guard lock(mutex_);
  return seed_;
}
void GeneratorImpl::set_seed(uint64_t seed) { set_state(seed, 0); }
uint64_t GeneratorImpl::offset() const {
  const std::lock_guard lock(mutex_);
  return offset_;
}
PhiloxArgs GeneratorImpl::state() const {
  const std::lock_guard lock(mutex_);
  return {seed_, offset_};
}
void GeneratorImpl::set_state(uint64_t seed, uint64_t offset) {
  const std::lock_guard lock(mutex_);
  seed_ = seed;
  offset_ = offset;
}
namespace {
thread_local uint64_t draws = 0;
}  // namespace
uint64_t own_draws() { return draws; }
void note_own_draw() { ++draws; }

PhiloxArgs GeneratorImpl::reserve(uint64_t counters) {
  const std::lock_guard lock(mutex_);
  const PhiloxArgs args{seed_, offset_};
  offset_ += counters;
  return args;
}

const Generator& default_generator(Device device) {
  static const Generator cpu = make_ref<GeneratorImpl>(Device{});
  static const Generator cuda[] = {make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 0}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 1}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 2}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 3}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 4}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 5}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 6}),
                                   make_ref<GeneratorImpl>(Device{DeviceType::CUDA, 7})};
  return device.is_cpu() ? cpu : cuda[device.index < 0 ? 0 : device.index % 8];
}

std::vector<const Generator*> default_generators() {
  std::vector<const Generator*> all{&default_generator({})};
  for (int8_t i = 0; i < 8; ++i) all.push_back(&default_generator({DeviceType::CUDA, i}));
  return all;
}

void manual_seed(uint64_t seed) {
  for (const Generator* generator : default_generators()) (*generator)->set_seed(seed);
}

}  // namespace vt
