// einsum: every operand is brought to one dimension a label (of extent 1 where it lacks the label),
// and operands are contracted pair by pair from the left through bmm.
#include <array>

#include "ops/composite/arithmetic.h"
#include "vt/meta_decls.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

constexpr int kLetters = 52;  // labels 0 to 51; the dimensions an ellipsis stands for follow

int label_of(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  return -1;
}
char letter_of(int label) { return static_cast<char>(label < 26 ? 'A' + label : 'a' + label - 26); }

/// One operand's (or the output's) subscript: labels in order; kEllipsis marks the ellipsis.
constexpr int kEllipsis = -1;
std::vector<int> parse_subscript(std::string_view text, std::string_view where) {
  std::vector<int> labels;
  bool seen = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ' ') continue;
    if (text[i] == '.') {
      check(!seen && text.substr(i, 3) == "...", "einsum(): found '.' for ", where,
            " that is not part of any ellipsis");
      seen = true;
      i += 2;
      labels.push_back(kEllipsis);
      continue;
    }
    const int label = label_of(text[i]);
    check(label >= 0, "einsum(): invalid subscript given at index ", i,
          " in the equation string for ", where, ", subscripts must be in [a-zA-Z]");
    labels.push_back(label);
  }
  return labels;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  size_t start = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i == text.size() || text[i] == separator) {
      parts.push_back(text.substr(start, i - start));
      start = i + 1;
    }
  }
  return parts;
}

/// Sums the products of `a` and `b` over `summed`; both have a dimension a label, extent 1 where a
/// label is missing.
Tensor contract(Tensor a, Tensor b, const std::vector<int64_t>& summed) {
  const int64_t n = a.dim();
  std::vector<bool> is_summed(static_cast<size_t>(n), false);
  for (const int64_t d : summed) is_summed[static_cast<size_t>(d)] = true;
  Dims both, left, right, inner, left_alone, right_alone;
  for (int64_t d = 0; d < n; ++d) {
    const bool in_a = a.sizes()[d] != 1, in_b = b.sizes()[d] != 1;
    if (is_summed[static_cast<size_t>(d)]) {
      if (in_a && in_b) {
        check(a.sizes()[d] == b.sizes()[d], "einsum(): subscript extents ", a.sizes()[d], " and ",
              b.sizes()[d], " differ");
        inner.push_back(d);
      } else if (in_a) {
        left_alone.push_back(d);
      } else if (in_b) {
        right_alone.push_back(d);
      }
    } else if (in_a && in_b) {
      check(a.sizes()[d] == b.sizes()[d], "einsum(): subscript extents ", a.sizes()[d], " and ",
            b.sizes()[d], " differ");
      both.push_back(d);
    } else if (in_a) {
      left.push_back(d);
    } else {
      right.push_back(d);
    }
  }
  if (!left_alone.empty()) a = sum(a, left_alone, true);
  if (!right_alone.empty()) b = sum(b, right_alone, true);
  if (inner.empty() && both.empty() && (left.empty() || right.empty())) return a * b;
  // Every summed label that did not go to `inner` has extent 1 by now: it stays as a dimension.
  Dims rest;
  for (int64_t d = 0; d < n; ++d) {
    if (is_summed[static_cast<size_t>(d)] &&
        std::find(inner.begin(), inner.end(), d) == inner.end())
      rest.push_back(d);
  }
  const auto extent = [](const Tensor& t, const Dims& dims) {
    int64_t e = 1;
    for (const int64_t d : dims) e *= t.sizes()[d];
    return e;
  };
  const auto arranged = [&](const Tensor& t, std::initializer_list<const Dims*> groups) {
    Dims order, shape;
    for (const Dims* group : groups) {
      order.append(group->begin(), group->end());
      shape.push_back(extent(t, *group));
    }
    // Dimensions of extent 1 that no group names go last.
    for (int64_t d = 0; d < n; ++d) {
      if (std::find(order.begin(), order.end(), d) == order.end()) order.push_back(d);
    }
    return ops::reshape(ops::permute(t, order), shape);
  };
  const Tensor product =
      ops::bmm(arranged(a, {&both, &left, &inner}), arranged(b, {&both, &inner, &right}));
  Dims order, shape;
  for (const Dims* group : {&both, &left}) {
    for (const int64_t d : *group) {
      order.push_back(d);
      shape.push_back(a.sizes()[d]);
    }
  }
  for (const int64_t d : right) {
    order.push_back(d);
    shape.push_back(b.sizes()[d]);
  }
  for (const Dims* group : {&inner, &rest}) {
    for (const int64_t d : *group) {
      order.push_back(d);
      shape.push_back(1);
    }
  }
  Dims inverse(static_cast<size_t>(n), 0);
  for (size_t i = 0; i < order.size(); ++i)
    inverse[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
  return ops::permute(ops::view(product, shape), inverse);
}

}  // namespace

Tensor einsum(std::string_view equation, TensorSpan operands) {
  check(!operands.empty(), "einsum(): must provide at least one operand");
  const size_t arrow = equation.find("->");
  const std::vector<std::string_view> inputs = split(equation.substr(0, arrow), ',');
  check(inputs.size() == operands.size(),
        "einsum(): ", inputs.size() > operands.size() ? "fewer" : "more",
        " operands were provided than specified in the equation: ", operands.size(), " for '",
        equation, "'");

  std::vector<std::vector<int>> subscripts;
  std::array<int, kLetters> count{};
  int64_t ellipsis = 0;
  for (size_t i = 0; i < operands.size(); ++i) {
    subscripts.push_back(parse_subscript(inputs[i], str("operand ", static_cast<int64_t>(i))));
    int64_t named = 0;
    bool open = false;
    for (const int label : subscripts[i]) {
      if (label == kEllipsis) {
        open = true;
      } else {
        ++named;
        ++count[static_cast<size_t>(label)];
      }
    }
    const int64_t extra = operands[i].dim() - named;
    check(open ? extra >= 0 : extra == 0, "einsum(): the number of subscripts in the equation (",
          named,
          open ? ") is more than the number of dimensions ("
               : ") does not match the number of dimensions (",
          operands[i].dim(), ") for operand ", static_cast<int64_t>(i),
          open ? "" : " and no ellipsis was given");
    if (open) ellipsis = std::max(ellipsis, extra);
  }

  // The place of every label in the common order: output first, then what is summed.
  std::vector<int64_t> place(static_cast<size_t>(kLetters + ellipsis), -1);
  int64_t next = 0;
  const auto put_ellipsis = [&] {
    for (int64_t e = 0; e < ellipsis; ++e) place[static_cast<size_t>(kLetters + e)] = next++;
  };
  if (arrow == std::string_view::npos) {
    put_ellipsis();
    for (int label = 0; label < kLetters; ++label) {
      if (count[static_cast<size_t>(label)] == 1) place[static_cast<size_t>(label)] = next++;
    }
  } else {
    for (const int label : parse_subscript(equation.substr(arrow + 2), "the output")) {
      if (label == kEllipsis) {
        put_ellipsis();
        continue;
      }
      check(count[static_cast<size_t>(label)] > 0, "einsum(): output subscript ", letter_of(label),
            " does not appear in the equation for any input operand");
      check(place[static_cast<size_t>(label)] < 0, "einsum(): output subscript ", letter_of(label),
            " appears more than once in the output");
      place[static_cast<size_t>(label)] = next++;
    }
  }
  const int64_t output_dims = next;
  for (size_t label = 0; label < place.size(); ++label) {
    const bool used = label >= kLetters || count[label] > 0;
    if (used && place[label] < 0) place[label] = next++;
  }
  const int64_t total = next;

  std::vector<Tensor> aligned;
  for (size_t i = 0; i < operands.size(); ++i) {
    Tensor t = operands[i];
    // Where every dimension of the operand goes; a label met again becomes a diagonal.
    std::vector<int64_t> target;
    const int64_t named = static_cast<int64_t>(subscripts[i].size()) -
                          std::count(subscripts[i].begin(), subscripts[i].end(), kEllipsis);
    const int64_t extra = t.dim() - named;
    for (const int label : subscripts[i]) {
      if (label == kEllipsis) {
        for (int64_t e = 0; e < extra; ++e)
          target.push_back(place[static_cast<size_t>(kLetters + ellipsis - extra + e)]);
      } else {
        target.push_back(place[static_cast<size_t>(label)]);
      }
    }
    for (size_t d = 0; d < target.size();) {
      const auto again =
          std::find(target.begin() + static_cast<std::ptrdiff_t>(d) + 1, target.end(), target[d]);
      if (again == target.end()) {
        ++d;
        continue;
      }
      const int64_t other = again - target.begin(), first = static_cast<int64_t>(d),
                    kept = target[d];
      check(t.sizes()[first] == t.sizes()[other], "einsum(): subscript is repeated for operand ",
            static_cast<int64_t>(i), " but the sizes don't match, ", t.sizes()[other],
            " != ", t.sizes()[first]);
      t = ops::diagonal(t, 0, first, other);
      target.erase(again);
      target.erase(target.begin() + first);
      target.push_back(kept);
      d = 0;
    }
    Dims order;
    std::vector<bool> present(static_cast<size_t>(total), false);
    for (int64_t p = 0; p < total; ++p) {
      for (size_t d = 0; d < target.size(); ++d) {
        if (target[d] != p) continue;
        order.push_back(static_cast<int64_t>(d));
        present[static_cast<size_t>(p)] = true;
      }
    }
    t = ops::permute(t, order);
    for (int64_t p = 0; p < total; ++p) {
      if (!present[static_cast<size_t>(p)]) t = ops::unsqueeze(t, p);
    }
    aligned.push_back(t);
  }

  // A label is summed at the last operand that has it.
  const auto sums_at = [&](size_t step) {
    std::vector<int64_t> dims;
    for (int64_t d = output_dims; d < total; ++d) {
      size_t last = 0;
      for (size_t i = 0; i < aligned.size(); ++i) {
        if (aligned[i].sizes()[d] != 1) last = i;
      }
      if (last == step) dims.push_back(d);
    }
    return dims;
  };
  std::vector<std::vector<int64_t>> plan;
  for (size_t i = 0; i < aligned.size(); ++i) plan.push_back(sums_at(i));
  Tensor out = aligned[0];
  if (!plan[0].empty()) out = sum(out, Dims(plan[0].begin(), plan[0].end()), true);
  for (size_t i = 1; i < aligned.size(); ++i) out = contract(out, aligned[i], plan[i]);
  if (total == output_dims) return out;
  return ops::reshape(out, Dims(out.sizes().first(static_cast<size_t>(output_dims))));
}

}  // namespace vt::composite
