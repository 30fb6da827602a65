// Attention of packed sequences of several lengths, with a window of keys around each query: a warp
// owns one query of one head and walks over the keys that it sees with a running softmax; in the
// backward pass another owns one key of one key head and walks over the queries that see it. No
// matrix of scores, no atomics, one order of sums. Where sequences begin is read by the kernels:
// the host waits for nothing. Arithmetic is in float, or double for doubles.
#include "cuda/kernels/rows.cuh"

namespace vt::cuda {
namespace {

constexpr int kWarps = 4;        // of a block
constexpr int kMostParts = 8;    // elements of a row that a lane keeps: rows of up to 256

/// Rows of a packed (T, H, D) operand. Strides in elements.
template <class S>
struct PackedRows {
  S* data;
  int64_t token, head, column;

  explicit PackedRows(const Tensor& t)
      : data(static_cast<S*>(t.data())),
        token(t.strides()[0]),
        head(t.strides()[1]),
        column(t.strides()[2]) {}
  __device__ S* row(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

/// A lane's elements of a row of `width`: lane, lane + 32, …; zeros beyond it.
template <class S>
__device__ inline void load_parts(Compute<S> (&parts)[kMostParts], const PackedRows<S>& rows,
                                  int64_t t, int64_t h, int width) {
  const S* row = rows.row(t, h);
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    const int c = threadIdx.x % kWarp + i * kWarp;
    parts[i] = c < width ? convert<Compute<S>>(row[c * rows.column]) : Compute<S>(0);
  }
}
template <class S>
__device__ inline void store_parts(const PackedRows<S>& rows, int64_t t, int64_t h, int width,
                                   const Compute<S> (&parts)[kMostParts]) {
  S* row = rows.row(t, h);
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    const int c = threadIdx.x % kWarp + i * kWarp;
    if (c < width) row[c * rows.column] = convert<S>(parts[i]);
  }
}
/// The product of two rows, in every lane.
template <class T>
__device__ inline T dot_parts(const T (&a)[kMostParts], const T (&b)[kMostParts]) {
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) sum += a[i] * b[i];
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}
template <class T>
__device__ inline void add_parts(T (&sum)[kMostParts], T factor, const T (&x)[kMostParts]) {
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) sum[i] += factor * x[i];
}

/// What all kernels know of the problem.
template <class S>
struct Packed {
  PackedRows<S> query, key, value;
  const int64_t *query_starts, *key_starts;
  int sequences, width, value_width;
  int64_t queries, keys, heads, key_heads, left, right;
  Compute<S> scale;

  Packed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seq_q,
         const Tensor& cu_seq_k, int64_t before, int64_t after, double factor)
      : query(q),
        key(k),
        value(v),
        query_starts(cu_seq_q.data_as<int64_t>()),
        key_starts(cu_seq_k.data_as<int64_t>()),
        sequences(static_cast<int>(cu_seq_q.numel()) - 1),
        width(static_cast<int>(q.sizes()[2])),
        value_width(static_cast<int>(v.sizes()[2])),
        queries(q.sizes()[0]),
        keys(k.sizes()[0]),
        heads(q.sizes()[1]),
        key_heads(k.sizes()[1]),
        left(before),
        right(after),
        scale(static_cast<Compute<S>>(factor)) {}
  __device__ int64_t group() const { return heads / key_heads; }
};

/// The tokens of one sequence. What the starts say is kept within memory.
struct Span {
  int64_t query, query_end, key, key_end;

  template <class S>
  __device__ Span(const Packed<S>& p, int i)
      : query(within(p.query_starts[i], p.queries)),
        query_end(within(p.query_starts[i + 1], p.queries)),
        key(within(p.key_starts[i], p.keys)),
        key_end(within(p.key_starts[i + 1], p.keys)) {}
  /// From a query's place to that of the key that is level with it, both within the sequence.
  __device__ int64_t behind() const { return (key_end - key) - (query_end - query); }

 private:
  __device__ static int64_t within(int64_t at, int64_t limit) {
    return at < 0 ? 0 : at > limit ? limit : at;
  }
};

/// The sequence that has `token`, or -1. Empty ones have none.
__device__ inline int sequence_of(const int64_t* starts, int sequences, int64_t token) {
  if (sequences <= 0 || token < starts[0] || token >= starts[sequences]) return -1;
  int low = 0, high = sequences - 1;  // the last that begins at or before the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (starts[middle] <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

/// The keys [begin, end) that a query sees.
struct Seen {
  int64_t begin, end;

  template <class S>
  __device__ Seen(const Packed<S>& p, const Span& s, int64_t query) {
    const int64_t level = query - s.query + s.behind(), keys = s.key_end - s.key;
    int64_t first = p.left < 0 || p.left > level ? 0 : level - p.left;
    int64_t last = p.right < 0 || p.right >= keys - level ? keys : level + p.right + 1;
    if (last < first) last = first;
    begin = s.key + first;
    end = s.key + last;
  }
};

template <class S>
__global__ void __launch_bounds__(kWarps* kWarp)
    varlen_forward(const Packed<S> p, const PackedRows<S> out, Compute<S>* lse) {
  using T = Compute<S>;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (at >= p.queries * p.heads) return;
  const int64_t t = at / p.heads, h = at % p.heads, kv = h / p.group();
  T sum[kMostParts] = {};
  T top = minus_infinity<T>(), total = 0;
  const int index = sequence_of(p.query_starts, p.sequences, t);
  if (index >= 0) {
    const Seen seen(p, Span(p, index), t);
    T q[kMostParts], row[kMostParts];
    load_parts(q, p.query, t, h, p.width);
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      load_parts(row, p.key, j, kv, p.width);
      const T score = dot_parts(q, row) * p.scale;
      const T next = score > top || score != score ? score : top;
      if (next == minus_infinity<T>()) continue;
      const T weight = exp_of(score - next), correction = exp_of(top - next);
      total = total * correction + weight;
      load_parts(row, p.value, j, kv, p.value_width);
#pragma unroll
      for (int i = 0; i < kMostParts; ++i) sum[i] = sum[i] * correction + weight * row[i];
      top = next;
    }
  }
  const T inverse = total > 0 || total != total ? T(1) / total : T(0);
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) sum[i] *= inverse;
  store_parts(out, t, h, p.value_width, sum);
  if (threadIdx.x % kWarp == 0) lse[h * p.queries + t] = top + log_of(total);
}

/// The gradient of a query, and `along`: the product of its output and that one's gradient.
template <class S>
__global__ void __launch_bounds__(kWarps* kWarp)
    varlen_query_gradients(const Packed<S> p, const PackedRows<S> grad_query,
                           const PackedRows<S> grad, const PackedRows<S> output,
                           const Compute<S>* lse, Compute<S>* along) {
  using T = Compute<S>;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (at >= p.queries * p.heads) return;
  const int64_t t = at / p.heads, h = at % p.heads, kv = h / p.group();
  T q[kMostParts], g[kMostParts], row[kMostParts], sum[kMostParts] = {};
  load_parts(g, grad, t, h, p.value_width);
  load_parts(row, output, t, h, p.value_width);
  const T mean = dot_parts(g, row), shift = lse[h * p.queries + t];
  if (threadIdx.x % kWarp == 0) along[h * p.queries + t] = mean;
  const int index = sequence_of(p.query_starts, p.sequences, t);
  if (index >= 0 && shift != minus_infinity<T>()) {
    const Seen seen(p, Span(p, index), t);
    load_parts(q, p.query, t, h, p.width);
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      load_parts(row, p.value, j, kv, p.value_width);
      const T slope = dot_parts(g, row);
      load_parts(row, p.key, j, kv, p.width);
      const T weight = exp_of(dot_parts(q, row) * p.scale - shift);
      add_parts(sum, weight * (slope - mean) * p.scale, row);
    }
  }
  store_parts(grad_query, t, h, p.width, sum);
}

template <class S>
__global__ void __launch_bounds__(kWarps* kWarp)
    varlen_key_gradients(const Packed<S> p, const PackedRows<S> grad_key,
                         const PackedRows<S> grad_value, const PackedRows<S> grad,
                         const Compute<S>* lse, const Compute<S>* along) {
  using T = Compute<S>;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (at >= p.keys * p.key_heads) return;
  const int64_t t = at / p.key_heads, kv = at % p.key_heads;
  T key_sum[kMostParts] = {}, value_sum[kMostParts] = {};
  const int index = sequence_of(p.key_starts, p.sequences, t);
  if (index >= 0) {
    const Span s(p, index);
    // Queries whose window has the key: level - left <= key <= level + right.
    const int64_t level = t - s.key - s.behind(), queries = s.query_end - s.query;
    int64_t first = p.right < 0 || p.right > level ? 0 : level - p.right;
    int64_t last = p.left < 0 || p.left >= queries - level ? queries : level + p.left + 1;
    T k[kMostParts], v[kMostParts], q[kMostParts], g[kMostParts];
    load_parts(k, p.key, t, kv, p.width);
    load_parts(v, p.value, t, kv, p.value_width);
    for (int64_t h = kv * p.group(); h < (kv + 1) * p.group(); ++h) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t token = s.query + i;
        const T shift = lse[h * p.queries + token];
        if (shift == minus_infinity<T>()) continue;
        load_parts(q, p.query, token, h, p.width);
        load_parts(g, grad, token, h, p.value_width);
        const T weight = exp_of(dot_parts(q, k) * p.scale - shift);
        const T slope = dot_parts(g, v);
        add_parts(value_sum, weight, g);
        add_parts(key_sum, weight * (slope - along[h * p.queries + token]) * p.scale, q);
      }
    }
  }
  store_parts(grad_key, t, kv, p.width, key_sum);
  store_parts(grad_value, t, kv, p.value_width, value_sum);
}

template <class F>
void visit_storage(const Tensor& t, const F& f) {
  switch (t.dtype()) {
    case DType::Float64:
      return f.template operator()<double>();
    case DType::BFloat16:
      return f.template operator()<__nv_bfloat16>();
    case DType::Float16:
      return f.template operator()<__half>();
    default:
      return f.template operator()<float>();
  }
}

void check_widths(const Tensor& query, const Tensor& value) {
  check(query.size(-1) <= kMostParts * kWarp && value.size(-1) <= kMostParts * kWarp,
        "varlen_attn: heads wider than ", kMostParts * kWarp,
        " have no kernel on CUDA; got shapes ", query.sizes(), " and ", value.sizes());
}
dim3 warps(int64_t count) { return dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kWarps))); }

void forward(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
             const Tensor& value, const Tensor& cu_seq_q, const Tensor& cu_seq_k, int64_t left,
             int64_t right, double scale) {
  check_widths(query, value);
  if (lse.numel() == 0) return;
  const Tensor query_starts = dense_as(cu_seq_q, DType::Int64),
               key_starts = dense_as(cu_seq_k, DType::Int64);
  const Launch launch(query.device());
  visit_storage(query, [&]<class S>() {
    const Packed<S> p(query, key, value, query_starts, key_starts, left, right, scale);
    launch(varlen_forward<S>, warps(lse.numel()), dim3(kWarps * kWarp), 0, p, PackedRows<S>(out),
           lse.data_as<Compute<S>>());
  });
}

void backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
              const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& cu_seq_q, const Tensor& cu_seq_k, const Tensor& output,
              const Tensor& lse, int64_t left, int64_t right, double scale) {
  check_widths(query, value);
  const Tensor query_starts = dense_as(cu_seq_q, DType::Int64),
               key_starts = dense_as(cu_seq_k, DType::Int64);
  const Tensor along = empty(lse.sizes(), lse.dtype(), lse.device());
  const Launch launch(query.device());
  visit_storage(query, [&]<class S>() {
    using T = Compute<S>;
    const Packed<S> p(query, key, value, query_starts, key_starts, left, right, scale);
    const PackedRows<S> g(grad);
    if (lse.numel() > 0) {
      launch(varlen_query_gradients<S>, warps(lse.numel()), dim3(kWarps * kWarp), 0, p,
             PackedRows<S>(grad_query), g, PackedRows<S>(output), lse.data_as<T>(),
             along.data_as<T>());
    }
    const int64_t pairs = p.keys * p.key_heads;
    if (pairs > 0) {
      launch(varlen_key_gradients<S>, warps(pairs), dim3(kWarps * kWarp), 0, p,
             PackedRows<S>(grad_key), PackedRows<S>(grad_value), g, lse.data_as<T>(),
             along.data_as<T>());
    }
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t._attention_varlen = forward;
  t._attention_varlen_backward = backward;
});

}  // namespace
}  // namespace vt::cuda
