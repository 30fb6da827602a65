// Losses in plain ops, and cross entropy's dispatch to the fused kernel.
#include "core/tensor_iterator.h"
#include "ops/composite/arithmetic.h"
#include "vt/meta_decls.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

Tensor number(double value) { return wrapped_scalar(Scalar(value)); }

/// Weight, or the shape it must have: one number a class.
Tensor class_weight(const Tensor& weight, int64_t ndim, int64_t class_dim) {
  Dims shape(static_cast<size_t>(ndim), 1);
  shape[class_dim] = weight.numel();
  return ops::view(weight, shape);
}

void check_targets(const Tensor& self, const Tensor& target, std::string_view op) {
  const int64_t n = self.dim();
  check(n >= 1 && (target.dim() == n - 1 || (n == 1 && target.dim() <= 1)), op,
        ": targets of shape ", target.sizes(), " do not fit logits of shape ", self.sizes(),
        "; expected (N, …) for (N, C, …)");
  if (n < 2) return;
  check_value(self.sizes()[0] == target.sizes()[0], "Expected input batch_size (", self.sizes()[0],
              ") to match target batch_size (", target.sizes()[0], ").");
  for (int64_t d = 2; d < n; ++d) {
    check(self.sizes()[d] == target.sizes()[d - 1], "Expected target size ", self.sizes(),
          " without its class dimension, got ", target.sizes());
  }
}

/// Class indices as int64: bytes are compared with ignore_index as the numbers they are.
Tensor index_targets(const Tensor& target) {
  check(target.dtype() == DType::Int64 || target.dtype() == DType::UInt8,
        "expected target dtype to be Long or Byte, but got ", scalar_type_name(target.dtype()),
        "; convert it with .to(torch.int64)");
  return target.dtype() == DType::Int64 ? target : ops::_to_dtype(target, DType::Int64);
}

/// (N, C, d1, …) as rows (N·d1·…, C).
Tensor class_rows(const Tensor& self) {
  const int64_t n = self.dim(), classes = self.sizes()[n == 1 ? 0 : 1];
  if (n == 1) return ops::unsqueeze(self, 0);
  if (n == 2) return self;
  return ops::reshape(ops::movedim(self, Dims{1}, Dims{-1}),
                      Dims{classes == 0 ? 0 : self.numel() / classes, classes});
}

Tensor with_probabilities(const Tensor& self, const Tensor& target, const Tensor& weight,
                          int64_t reduction, double label_smoothing) {
  const int64_t dim = self.dim() == 1 ? 0 : 1, classes = self.sizes()[dim];
  Tensor wanted = target;
  if (label_smoothing > 0)
    wanted = wanted * (1 - label_smoothing) + label_smoothing / static_cast<double>(classes);
  Tensor terms = ops::log_softmax(self, dim, std::nullopt) * wanted;
  if (weight.defined()) terms = terms * class_weight(weight, self.dim(), dim);
  if (reduction == 0) return -sum(terms, Dims{dim}, false);
  const double rows =
      static_cast<double>(self.numel()) / static_cast<double>(std::max<int64_t>(classes, 1));
  return reduction == 1 ? -sum(terms) / rows : -sum(terms);
}

/// `loss`, reduced, plus z_loss times the squares of `lse`, a number a row, each times its factor:
/// in lse's dtype until the sum is rounded.
Tensor with_z_loss(const Tensor& loss, const Tensor& lse, const Tensor& factors, double z_loss,
                   int64_t reduction) {
  Tensor terms = lse * lse * z_loss;
  if (factors.defined()) terms = terms * factors;
  if (reduction != 0) terms = sum(terms);
  return ops::_to_dtype(ops::_to_dtype(loss, lse.dtype()) + terms, loss.dtype());
}

/// What each row counts in the reduced loss: its class weight, over their sum for the mean.
Tensor row_factors(const Tensor& target, const Tensor& weight, int64_t reduction,
                   int64_t ignore_index, const Tensor& total_weight) {
  const Tensor valid = ops::ne(target, wrapped_scalar(Scalar(ignore_index)));
  Tensor factors = ops::_to_dtype(valid, total_weight.dtype());
  if (weight.defined()) {
    const Tensor safe =
        ops::_to_dtype(ops::mul(target, ops::_to_dtype(valid, target.dtype())), DType::Int64);
    factors = factors *
              ops::_to_dtype(ops::index_select(ops::detach(weight), 0, safe), total_weight.dtype());
  }
  // Where every row is ignored the mean is NaN, but no row has a gradient.
  if (reduction == 1) factors = ops::where(valid, factors / total_weight, number(0.0));
  return factors;
}

}  // namespace

Tensor cross_entropy_loss(const Tensor& self, const Tensor& target, const Tensor& weight,
                          int64_t reduction, int64_t ignore_index, double label_smoothing,
                          double z_loss) {
  check(self.dim() >= 1,
        "cross_entropy: expected logits of at least one dimension, got a 0-d tensor");
  if (is_floating(target.dtype()) && std::ranges::equal(self.sizes(), target.sizes())) {
    check(label_smoothing >= 0 && label_smoothing <= 1,
          "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
    const Tensor loss = with_probabilities(self, target, weight, reduction, label_smoothing);
    if (z_loss == 0) return loss;
    const DType wide = self.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
    const int64_t dim = self.dim() == 1 ? 0 : 1;
    const Tensor lse = ops::logsumexp(ops::_to_dtype(self, wide), Dims{dim}, false);
    const double rows = static_cast<double>(std::max<int64_t>(lse.numel(), 1));
    return with_z_loss(loss, lse, Tensor(), reduction == 1 ? z_loss / rows : z_loss, reduction);
  }
  check_targets(self, target, "cross_entropy");
  const Tensor classes = index_targets(target);
  const Tensor indices = self.dim() == 2 ? classes : ops::reshape(classes, Dims{-1});
  auto [loss, lse, total_weight] = ops::_cross_entropy_index(
      class_rows(self), indices, weight, reduction, ignore_index, label_smoothing);
  if (z_loss != 0) {
    loss =
        with_z_loss(loss, lse, row_factors(indices, weight, reduction, ignore_index, total_weight),
                    z_loss, reduction);
  }
  return reduction != 0 || self.dim() == 2 ? loss : ops::view(loss, target.sizes());
}

std::tuple<Tensor, Tensor, Tensor> _cross_entropy_index_composite(
    const Tensor& self, const Tensor& target, const Tensor& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing) {
  const Tensor logs = ops::log_softmax(self, 1, std::nullopt);
  const Tensor valid = ops::ne(target, wrapped_scalar(Scalar(ignore_index)));
  const Tensor safe =
      ops::_to_dtype(ops::mul(target, ops::_to_dtype(valid, target.dtype())), DType::Int64);
  const Tensor picked =
      ops::squeeze_dim(ops::gather(logs, 1, ops::unsqueeze(safe, 1), false), Dims{1});
  const Tensor keep = ops::_to_dtype(valid, self.dtype());
  const Tensor weights = weight.defined() ? ops::index_select(weight, 0, safe) * keep : keep;
  Tensor loss = -(picked * weights) * (1 - label_smoothing);
  if (label_smoothing > 0) {
    const Tensor spread = weight.defined() ? logs * weight : logs;
    loss = loss - sum(spread, Dims{1}, false) * keep *
                      (label_smoothing / static_cast<double>(self.sizes()[1]));
  }
  const Tensor total = sum(weights);
  const DType wide = self.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  const Tensor lse =
      ops::where(valid, ops::logsumexp(ops::_to_dtype(self, wide), Dims{1}, false), number(0.0));
  return {reduction == 0   ? loss
          : reduction == 1 ? sum(loss) / total
                           : sum(loss),
          lse, ops::detach(total)};
}

Tensor nll_loss(const Tensor& self, const Tensor& target, const Tensor& weight, int64_t reduction,
                int64_t ignore_index) {
  check_targets(self, target, "nll_loss");
  if (!is_floating(self.dtype())) dtype_not_supported(self.dtype(), "nll_loss");
  const Tensor rows = class_rows(self);
  const int64_t classes = rows.sizes()[1];
  if (weight.defined()) {
    check(weight.dim() == 1 && weight.numel() == classes,
          "weight tensor should be defined either for all ", classes,
          " classes or no classes but got weight tensor of shape: ", weight.sizes());
  }
  const Tensor indices = ops::reshape(index_targets(target), Dims{-1});
  const Tensor valid = ops::ne(indices, wrapped_scalar(Scalar(ignore_index)));
  const Tensor safe =
      ops::_to_dtype(ops::mul(indices, ops::_to_dtype(valid, indices.dtype())), DType::Int64);
  // Zeros in place of what is ignored, and not only times zero: where all is, the mean's gradient
  // is no number.
  const Tensor picked = ops::where(
      valid, ops::squeeze_dim(ops::gather(rows, 1, ops::unsqueeze(safe, 1), false), Dims{1}),
      number(0));
  const Tensor keep = ops::_to_dtype(valid, self.dtype());
  const Tensor weights = weight.defined() ? ops::index_select(weight, 0, safe) * keep : keep;
  const Tensor loss = -(picked * weights);
  if (reduction == 0) return ops::view(loss, target.sizes());
  return reduction == 1 ? sum(loss) / sum(weights) : sum(loss);
}

Tensor mse_loss(const Tensor& self, const Tensor& target, int64_t reduction) {
  const Tensor d = self - target;
  return reduced(d * d, reduction);
}

Tensor l1_loss(const Tensor& self, const Tensor& target, int64_t reduction) {
  return reduced(ops::abs(self - target), reduction);
}

Tensor smooth_l1_loss(const Tensor& self, const Tensor& target, int64_t reduction, double beta) {
  check(beta >= 0, "smooth_l1_loss does not support negative values for beta.");
  if (beta == 0) return ops::l1_loss(self, target, reduction);
  const Tensor d = ops::abs(self - target);
  return reduced(ops::where(ops::lt(d, number(beta)), d * d * (0.5 / beta), d - 0.5 * beta),
                 reduction);
}

Tensor huber_loss(const Tensor& self, const Tensor& target, int64_t reduction, double delta) {
  check(delta > 0, "huber_loss does not support non-positive values for delta.");
  const Tensor d = ops::abs(self - target);
  return reduced(ops::where(ops::lt(d, number(delta)), d * d * 0.5, (d - 0.5 * delta) * delta),
                 reduction);
}

Tensor binary_cross_entropy(const Tensor& self, const Tensor& target, const Tensor& weight,
                            int64_t reduction) {
  check_value(std::ranges::equal(self.sizes(), target.sizes()), "Using a target size (",
              target.sizes(), ") that is different to the input size (", self.sizes(),
              ") is deprecated. Please ensure they have the same size.");
  Tensor loss = ops::_binary_cross_entropy(self, target);
  if (weight.defined()) loss = loss * weight;
  return reduced(loss, reduction);
}

Tensor binary_cross_entropy_with_logits(const Tensor& self, const Tensor& target,
                                        const Tensor& weight, const Tensor& pos_weight,
                                        int64_t reduction) {
  check_value(std::ranges::equal(self.sizes(), target.sizes()), "Target size (", target.sizes(),
              ") must be the same as input size (", self.sizes(), ")");
  // -log sigmoid(-x) = x - log sigmoid(x); both sides through log_sigmoid, which does not overflow.
  const Tensor log_yes = ops::log_sigmoid(self);
  Tensor loss = (1.0 - target) * self;
  if (pos_weight.defined()) {
    loss = loss - ((pos_weight - 1) * target + 1) * log_yes;
  } else {
    loss = loss - log_yes;
  }
  if (weight.defined()) loss = loss * weight;
  return reduced(loss, reduction);
}

Tensor kl_div(const Tensor& self, const Tensor& target, int64_t reduction, bool log_target) {
  const Tensor loss =
      log_target ? ops::exp(target) * (target - self) : ops::xlogy(target, target) - target * self;
  return reduced(loss, reduction);
}

Tensor cosine_similarity(const Tensor& x1, const Tensor& x2, int64_t dim, double eps) {
  const Tensor* operands[] = {&x1, &x2};
  const DType type = result_type(operands);
  check(is_floating(type),
        "cosine_similarity: expected common dtype to be floating point, yet common "
        "dtype is ",
        type);
  // Squares of 16-bit floats, and eps, need the range of float32.
  const DType wide_type = is_reduced_float(type) ? DType::Float32 : type;
  const auto widened = [&](const Tensor& x) {
    return x.dtype() == wide_type ? x : ops::_to_dtype(x, wide_type);
  };
  const auto length = [&](const Tensor& x) {
    const Tensor squares = sum(x * x, Dims{dim}, true);
    return ops::sqrt(ops::clamp_min(squares, number(eps * eps)));
  };
  const Tensor both[] = {widened(x1), widened(x2)};
  const std::vector<Tensor> wide = ops::broadcast_tensors(both);
  const Tensor cosine =
      sum((wide[0] / length(wide[0])) * (wide[1] / length(wide[1])), Dims{dim}, false);
  return type == wide_type ? cosine : ops::_to_dtype(cosine, type);
}

Tensor margin_ranking_loss(const Tensor& input1, const Tensor& input2, const Tensor& target,
                           double margin, int64_t reduction) {
  return reduced(ops::clamp_min(-target * (input1 - input2) + margin, number(0)), reduction);
}

Tensor hinge_embedding_loss(const Tensor& self, const Tensor& target, double margin,
                            int64_t reduction) {
  const Tensor zero = ops::zeros_like(self, std::nullopt, std::nullopt, std::nullopt);
  const Tensor far =
      ops::where(ops::ne(target, number(1)), ops::clamp_min(margin - self, number(0)), zero);
  const Tensor near = ops::where(ops::ne(target, number(-1)), self, zero);
  return reduced(far + near, reduction);
}

Tensor cosine_embedding_loss(const Tensor& input1, const Tensor& input2, const Tensor& target,
                             double margin, int64_t reduction) {
  const auto floating = [](const Tensor& t) {
    return is_floating(t.dtype()) ? t : ops::_to_dtype(t, default_dtype());
  };
  const Tensor cosine =
      ops::cosine_similarity(floating(input1), floating(input2), input1.dim() - 1, 1e-8);
  const Tensor zero = ops::zeros_like(cosine, std::nullopt, std::nullopt, std::nullopt);
  const Tensor near = ops::where(ops::eq(target, number(1)), 1.0 - cosine, zero);
  const Tensor far =
      ops::where(ops::eq(target, number(-1)), ops::clamp_min(cosine - margin, number(0)), zero);
  return reduced(near + far, reduction);
}

}  // namespace vt::composite
