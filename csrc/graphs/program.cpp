#include "graphs/program.h"

#include <algorithm>

namespace vt::graphs {

void Program::add(const Call& call, TensorSpan inputs, TensorSpan outputs) {
  check(outputs.size() == call.outputs.size(), op_name(call.id), ": ", call.outputs.size(),
        " outputs to bind, not ", outputs.size());
  Instruction instruction{call.id, call.bind(inputs), {outputs.begin(), outputs.end()}, -1, 0, {}};
  if (!outputs.empty()) instruction.device = outputs[0].device();
  for (size_t i = 0; i < instruction.args.size(); ++i) {
    if (!std::holds_alternative<PhiloxArgs>(instruction.args[i])) continue;
    instruction.rng = static_cast<int>(i);
    instruction.random_offset = call.random_offset;
  }
  instructions_.push_back(std::move(instruction));
  for (const Tensor& out : outputs) {
    const auto same = [&](const Tensor& known) { return known.storage() == out.storage(); };
    if (out.defined() && std::none_of(written_.begin(), written_.end(), same))
      written_.push_back(out);
  }
}

void Program::draw(Device device, uint64_t counters) { draws_.push_back({device, counters}); }

void Program::reserve() {
  for (const Draw& draw : draws_) {
    const PhiloxArgs base = default_generator(draw.device)->reserve(draw.counters);
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
  reserve();
  for (const Instruction& instruction : instructions_)
    execute_kernel(instruction.id, instruction.args, instruction.outputs);
  for (const Tensor& tensor : written_) tensor.bump_version();
}

void Program::run_op(size_t index) {
  check_index(index < instructions_.size(), "a program of ", instructions_.size(),
              " ops has none at ", index);
  check(thread_state.consumer == nullptr, "a captured op cannot be run inside a recording");
  const Scoped<bool> no_grad(thread_state.grad_enabled, false);
  const Instruction& instruction = instructions_[index];
  execute_kernel(instruction.id, instruction.args, instruction.outputs);
}

}  // namespace vt::graphs
