#include "cuda/kernels/attention_sums.cuh"
#include "cuda/preload.h"

#include <algorithm>

VT_LOAD_EARLY

namespace vt::cuda::attention {
namespace {

int64_t columns(const Tensor& sums) { return sums.defined() ? sums.numel() : 0; }

size_t bytes(const GradientSums& sums, int64_t query_rows, int64_t key_rows) {
  return static_cast<size_t>(query_rows * columns(sums.query) +
                             key_rows * (columns(sums.key) + columns(sums.value))) *
         sizeof(float);
}

}  // namespace

PartialSums::PartialSums(const Launch& launch, const GradientSums& sums, int64_t query_rows,
                         int64_t key_rows)
    : sums_(sums),
      query_rows_(query_rows),
      key_rows_(key_rows),
      memory_(bytes(sums, query_rows, key_rows), launch) {
  auto* next = memory_.data<float>();
  const auto take = [&](const Tensor& of, int64_t rows) {
    if (!of.defined()) return static_cast<float*>(nullptr);
    float* const mine = next;
    next += rows * of.numel();
    return mine;
  };
  parts_ = {take(sums.query, query_rows), take(sums.key, key_rows), take(sums.value, key_rows)};
}

void PartialSums::add(const Launch& launch) const {
  ColumnPartsList<float> queries, keys;
  queries.add(sums_.query, parts_.query);
  keys.add(sums_.key, parts_.key);
  keys.add(sums_.value, parts_.value);
  const int64_t query_columns = columns(sums_.query),
                key_columns = std::max(columns(sums_.key), columns(sums_.value));
  // One launch where all have as many columns and rows.
  if (query_columns == key_columns && query_rows_ == key_rows_) {
    keys.add(sums_.query, parts_.query);
    queries.count = 0;
  }
  if (queries.count > 0) add_column_parts(launch, queries, query_columns, query_rows_);
  if (keys.count > 0) add_column_parts(launch, keys, key_columns, key_rows_);
}

}  // namespace vt::cuda::attention
