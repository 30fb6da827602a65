#include "cuda/kernels/attention_cudnn.h"

#include <bit>
#include <limits>

#include "core/kernel_switches.h"
#include "cuda/cudnn.h"
#include "cuda/cudnn_graph.h"
#include "cuda/kernels/copy.cuh"

namespace vt::cuda::attention {
namespace {

using namespace cudnn;

// Below this many multiplications our own kernels are about as fast, take less of the host's time
// and need no plan for a new shape.
constexpr double kLeastWork = double{1 << 25};
// Plans made for one kind of attention. A plan takes a tenth of a second, a second for the first
// of its kind, so text that grows by a token at a time is left to our own kernels.
constexpr int kMostLengths = 24;
// Sums of the queries' gradient in a fixed order need the gradients of all scores in memory, as
// 16-bit floats. Up to the first number that costs next to nothing; beyond the second, too much.
constexpr int64_t kCheapScores = int64_t{1} << 26, kMostScores = int64_t{1} << 30;

struct Shape {
  DType dtype;
  bool causal;
  float scale;
  int64_t batch, heads, key_heads, queries, keys, width, value_width;

  Shape(const Tensor& q, const Tensor& k, const Tensor& v, bool is_causal, double factor)
      : dtype(q.dtype()),
        causal(is_causal),
        scale(static_cast<float>(factor)),
        batch(q.sizes()[0]),
        heads(q.sizes()[1]),
        key_heads(k.sizes()[1]),
        queries(q.sizes()[2]),
        keys(k.sizes()[2]),
        width(q.sizes()[3]),
        value_width(v.sizes()[3]) {}
  Dims rows() const { return {batch, heads, queries, 1}; }
  Dims scores() const { return {batch, heads, queries, keys}; }
  /// What all lengths have in common.
  PlanKey family(int kind) const {
    PlanKey key;
    key.add(kind | static_cast<int>(dtype) << 8 | int64_t{causal} << 16);
    key.add(std::bit_cast<int32_t>(scale));
    for (const int64_t n : {batch, heads, key_heads, width, value_width}) key.add(n);
    return key;
  }
};

/// Strides as the library is told them: those of dimensions of one element are made regular.
Dims regular_strides(const Tensor& t) {
  Dims out(4, 1);
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 3; d-- > 0;) out[d] = sizes[d] > 1 ? strides[d] : out[d + 1] * sizes[d + 1];
  return out;
}

/// Whether the kernels can read (or write) an operand where it lies.
bool in_pieces(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (reinterpret_cast<uintptr_t>(t.data()) % 16 != 0 || strides[3] != 1) return false;
  for (size_t d = 0; d < 3; ++d) {
    if (sizes[d] > 1 && (strides[d] <= 0 || strides[d] % 8 != 0)) return false;
  }
  return true;
}

bool applies(const Launch& launch, const Shape& s) {
  if (!kernel_switch(KernelSwitch::CudnnEnabled) || !kernel_switch(KernelSwitch::CudnnAttention))
    return false;
  if (s.dtype != DType::Float16 && s.dtype != DType::BFloat16) return false;
  const double work = static_cast<double>(s.batch * s.heads) * static_cast<double>(s.queries) *
                      static_cast<double>(s.keys) * static_cast<double>(s.width + s.value_width);
  if (work < kLeastWork && !kernel_switch(KernelSwitch::CudnnSmallAttention)) return false;
  if (s.queries <= 1 || s.keys <= 1 || work == 0) return false;
  if (s.width % 8 != 0 || s.value_width % 8 != 0 || std::max(s.width, s.value_width) > 256)
    return false;
  if (launch.properties().major < 8 || !cudnn_available()) return false;
  // Before 9.6 gradients had to be cleared beforehand; 9.10.0 and 9.10.1 are known to be wrong.
  static const int64_t version = cudnn_version();
  return version >= 90600 && version != 91000 && version != 91001;
}

Graph::Id operand(Graph& g, DataType type, const Tensor& t) {
  return g.operand(type, t.sizes(), regular_strides(t));
}
/// Rows and columns exchanged.
Graph::Id transposed(Graph& g, DataType type, const Tensor& t) {
  Dims sizes(t.sizes()), strides = regular_strides(t);
  std::swap(sizes[2], sizes[3]);
  std::swap(strides[2], strides[3]);
  return g.operand(type, sizes, strides);
}

/// y = x where the key's place is not after the query's, -inf elsewhere.
Graph::Id causal_mask(Graph& g, const Shape& s, Graph::Id x, float never) {
  const Graph::Id row = g.value(DataType::Int32, s.scores());
  const Graph::Id column = g.value(DataType::Int32, s.scores());
  const Graph::Id seen = g.value(DataType::Boolean, s.scores());
  const Graph::Id y = g.value(DataType::Float, s.scores());
  g.index(row, x, 2);
  g.index(column, x, 3);
  g.compare(Pointwise::GreaterEqual, seen, row, column);
  g.pointwise(Pointwise::Select, y, x, g.constant(never, 4), seen);
  return y;
}
float minus_infinity() {
  // Older engines know the mask by this value.
  return cudnn_version() < 91000 ? std::numeric_limits<float>::lowest()
                                 : -std::numeric_limits<float>::infinity();
}

/// Operands: query, key, value, out, lse.
void describe_forward(Graph& g, const Shape& s, const Tensor& query, const Tensor& key,
                      const Tensor& value, const Tensor& out) {
  const DataType io = data_type(s.dtype);
  const Dims scores = s.scores(), rows = s.rows();
  const auto values = [&](const Dims& sizes, DataType type = DataType::Float) {
    return g.value(type, sizes);
  };
  const Graph::Id q = operand(g, io, query), k = transposed(g, io, key), v = operand(g, io, value),
                  o = operand(g, io, out);
  const Graph::Id stats = g.operand(DataType::Float, rows, contiguous_strides(rows));

  const Graph::Id dot = values(scores), scaled = values(scores);
  g.matmul(dot, q, k);
  g.pointwise(Pointwise::Mul, scaled, dot, g.constant(s.scale, 4));
  const Graph::Id masked = s.causal ? causal_mask(g, s, scaled, minus_infinity()) : scaled;
  const Graph::Id top = values(rows), shifted = values(scores), exponent = values(scores),
                  total = values(rows), log = values(rows), weights = values(scores, io);
  g.reduce(Reduction::Max, top, masked);
  g.pointwise(Pointwise::Sub, shifted, masked, top);
  g.pointwise(Pointwise::Exp, exponent, shifted);
  g.reduce(Reduction::Add, total, exponent);
  g.pointwise(Pointwise::Log, log, total);
  g.pointwise(Pointwise::Add, stats, top, log);
  g.pointwise(Pointwise::Div, weights, exponent, total);
  g.matmul(o, weights, v);
}

struct Gradients {
  const Tensor &query, &key, &value;
};

/// Operands: query, key, value, output, grad, lse, the three gradients, the sums of grad · output,
/// and, unless `ordered`, a float32 accumulator of the query's gradient.
void describe_backward(Graph& g, const Shape& s, const Tensor& query, const Tensor& key,
                       const Tensor& value, const Tensor& output, const Tensor& grad,
                       const Gradients& grads, bool ordered) {
  const DataType io = data_type(s.dtype);
  const Dims scores = s.scores(), rows = s.rows();
  const auto values = [&](const Dims& sizes, DataType type = DataType::Float) {
    return g.value(type, sizes);
  };
  const Graph::Id q = operand(g, io, query), k = transposed(g, io, key),
                  v = transposed(g, io, value), o = operand(g, io, output),
                  dy = operand(g, io, grad);
  const Graph::Id stats = g.operand(DataType::Float, rows, contiguous_strides(rows));
  const Graph::Id dq = operand(g, io, grads.query), dk = operand(g, io, grads.key),
                  dv = operand(g, io, grads.value);
  const Graph::Id along = g.operand(DataType::Float, rows, contiguous_strides(rows));
  const Graph::Id scale = g.constant(s.scale, 4);

  // along = Σ grad · output of every query.
  const Dims out_sizes{s.batch, s.heads, s.queries, s.value_width};
  const Graph::Id product = values(out_sizes), sum = values(rows);
  g.pointwise(Pointwise::Mul, product, dy, o);
  g.reduce(Reduction::Add, sum, product);
  g.pointwise(Pointwise::Mul, along, sum, g.constant(1, 4));

  // The probabilities, again.
  const Graph::Id dot = values(scores), scaled = values(scores), shifted = values(scores),
                  weights = values(scores);
  g.matmul(dot, q, k);
  g.pointwise(Pointwise::Mul, scaled, dot, scale);
  g.pointwise(Pointwise::Sub, shifted, scaled, stats);
  const Graph::Id masked = s.causal ? causal_mask(g, s, shifted, minus_infinity()) : shifted;
  g.pointwise(Pointwise::Exp, weights, masked);

  const Dims turned{s.batch, s.heads, s.keys, s.queries};
  const Dims turned_strides{s.heads * s.queries * s.keys, s.queries * s.keys, 1, s.keys};
  // x transposed times rows of y: with shared key heads, summed over the heads that share one.
  const auto times_queries = [&](Graph::Id result, Graph::Id x, Graph::Id y, int64_t width) {
    const Graph::Id flipped = g.value(io, turned, turned_strides);
    g.reshape(flipped, x);
    if (s.heads == s.key_heads) {
      g.matmul(result, flipped, y);
      return;
    }
    const Graph::Id whole = values({s.batch, s.heads, s.keys, width}, io);
    g.matmul(whole, flipped, y);
    g.reduce(Reduction::Add, result, whole);
  };
  times_queries(dv, weights, dy, s.value_width);

  const Graph::Id dweights = values(scores), centred = values(scores), dscores = values(scores),
                  ddot = values(scores);
  g.matmul(dweights, dy, v);
  g.pointwise(Pointwise::Sub, centred, dweights, along);
  g.pointwise(Pointwise::Mul, dscores, centred, weights);
  g.pointwise(Pointwise::Mul, ddot, dscores, scale);
  times_queries(dk, ddot, q, s.width);

  const Graph::Id keys = g.value(DataType::Float, key.sizes(), regular_strides(key));
  g.reshape(keys, k);
  if (ordered) {
    g.matmul(dq, ddot, keys);
    return;
  }
  const Dims query_sizes{s.batch, s.heads, s.queries, s.width};
  const Graph::Id total = g.operand(DataType::Float, query_sizes, contiguous_strides(query_sizes));
  g.matmul(total, ddot, keys);
  g.pointwise(Pointwise::Identity, dq, total);
}

PlanKey plan_key(const PlanKey& family, const Shape& s,
                 std::initializer_list<const Tensor*> operands) {
  PlanKey key = family;
  key.add(s.queries);
  key.add(s.keys);
  for (const Tensor* t : operands) {
    const Dims strides = regular_strides(*t);
    key.add(IntSpan(strides).first(3));
  }
  return key;
}

void run(const Launch& launch, const Plan& plan, Handle handle, std::span<void* const> operands) {
  const Scratch workspace(static_cast<size_t>(plan.workspace), launch);
  plan.run(handle, operands, workspace.data());
}

}  // namespace

bool cudnn_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  const Shape s(query, key, value, is_causal, scale);
  if (!applies(launch, s)) return false;
  for (const Tensor* t : {&out, &query, &key, &value}) {
    if (!in_pieces(*t)) return false;
  }
  Context& context = Context::of({launch.stream(), launch.device()});
  const PlanKey family = s.family(0);
  const PlanKey known = plan_key(family, s, {&query, &key, &value, &out});
  Plans* plans = context.find(known, family, kMostLengths, [&](Handle handle) {
    Graph g;
    describe_forward(g, s, query, key, value, out);
    return make_plans(g, handle, {});
  });
  if (!plans || plans->empty()) return false;
  void* const operands[] = {query.data(), key.data(), value.data(), out.data(), lse.data()};
  run(launch, plans->front(), context.handle(), operands);
  return true;
}

bool cudnn_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                    const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                    bool is_causal, double scale) {
  const Shape s(query, key, value, is_causal, scale);
  if (!applies(launch, s)) return false;
  // Lengths that are no multiple of the engines' tiles: right since 9.15.1.
  if (s.keys % 128 != 0 && cudnn_version() <= 91500) return false;
  const int64_t scores =
      s.batch * s.heads * ((s.queries + 63) / 64 * 64) * ((s.keys + 127) / 128 * 128);
  const bool asked = kernel_switch(KernelSwitch::DeterministicAlgorithms);
  if (asked && scores > kMostScores) return false;
  const bool ordered = asked || scores <= kCheapScores;
  const Tensor g = in_pieces(grad) ? grad : contiguous(grad);
  for (const Tensor* t : {&grad_query, &grad_key, &grad_value, &g, &query, &key, &value, &output}) {
    if (!in_pieces(*t)) return false;
  }
  Context& context = Context::of({launch.stream(), launch.device()});
  const PlanKey family = s.family(ordered ? 2 : 1);
  const PlanKey known =
      plan_key(family, s, {&query, &key, &value, &output, &g, &grad_query, &grad_key, &grad_value});
  Plans* plans = context.find(known, family, kMostLengths, [&](Handle handle) {
    Graph graph;
    describe_backward(graph, s, query, key, value, output, g, {grad_query, grad_key, grad_value},
                      ordered);
    return make_plans(graph, handle, {.deterministic = ordered});
  });
  if (!plans || plans->empty()) return false;
  const auto rows = static_cast<size_t>(s.batch * s.heads * s.queries);
  const Scratch along(rows * sizeof(float), launch);
  const Scratch total(ordered ? 0 : rows * static_cast<size_t>(s.width) * sizeof(float), launch);
  void* const operands[] = {query.data(),      key.data(),   value.data(),      output.data(),
                            g.data(),          lse.data(),   grad_query.data(), grad_key.data(),
                            grad_value.data(), along.data(), total.data()};
  try {
    run(launch, plans->front(), context.handle(),
        std::span<void* const>(operands).first(ordered ? 10 : 11));
  } catch (const Error& error) {
    // The matrices of scores do not fit at present; our own kernels need none.
    if (!ordered || error.kind() != ErrorKind::OutOfMemory) throw;
    return false;
  }
  return true;
}

}  // namespace vt::cuda::attention
