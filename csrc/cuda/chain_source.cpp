#include <algorithm>
#include <array>
#include <optional>

#include "core/error.h"
#include "cuda/chain.h"
#include "dispatch/pointwise.h"
#include "vt/chain_texts.h"

namespace vt::cuda {
namespace {

using Walk = ChainOperand::Walk;

/// What an op is in terms of its inputs $0, $1, $2. result: of a test it is bool.
struct Form {
  std::string_view name;
  int inputs;
  std::string_view text;
  bool test = false;
};

constexpr Form kForms[] = {
    {"mul", 2, "times($0, $1)"},
    {"div", 2, "quotient($0, $1)"},
    {"maximum", 2, "larger($0, $1)"},
    {"minimum", 2, "smaller($0, $1)"},
    {"neg", 1, "-$0"},
    {"abs", 1, "fabs($0)"},
    {"square", 1, "times($0, $0)"},
    {"reciprocal", 1, "quotient(C(1), $0)"},
    {"sqrt", 1, "root($0)"},
    {"rsqrt", 1, "apart(rsqrt($0))"},
    {"exp", 1, "apart(exp($0))"},
    {"exp2", 1, "apart(exp2($0))"},
    {"log", 1, "apart(log($0))"},
    {"log2", 1, "apart(log2($0))"},
    {"tanh", 1, "apart(tanh($0))"},
    {"erf", 1, "apart(erf($0))"},
    {"sigmoid", 1, "sigmoid($0)"},
    {"relu", 1, "relu($0)"},
    {"silu", 1, "silu($0)"},
    {"mish", 1, "mish($0)"},
    {"silu_backward", 2, "times($0, silu_slope($1))"},
    {"tanh_backward", 2, "times($0, times_plus(-$1, $1, C(1)))"},
    {"sigmoid_backward", 2, "times(times($0, plus(C(1), -$1)), $1)"},
    {"eq", 2, "$0 == $1", true},
    {"ne", 2, "$0 != $1", true},
    {"lt", 2, "$0 < $1", true},
    {"le", 2, "$0 <= $1", true},
    {"gt", 2, "$0 > $1", true},
    {"ge", 2, "$0 >= $1", true},
    {"logical_not", 1, "$0 == C(0)", true},
    {"logical_and", 2, "$0 != C(0) && $1 != C(0)", true},
    {"logical_or", 2, "$0 != C(0) || $1 != C(0)", true},
};

std::string_view dtype_tag(DType dtype) {
  switch (dtype) {
    case DType::Bool:
      return "Bool";
    case DType::Float16:
      return "Half";
    case DType::BFloat16:
      return "BFloat16";
    case DType::Float32:
      return "Float";
    case DType::Float64:
      return "Double";
    default:
      fail(ErrorKind::NotImplemented, "_fused_pointwise: chains on a GPU have no ", dtype);
  }
}
std::string_view value_type(DType dtype) {
  return dtype == DType::Bool ? "bool" : dtype == DType::Float64 ? "double" : "float";
}

/// A number of the host as an op that computes in `dtype` sees it.
double number_as(const Scalar& number, DType dtype) {
  const double x = number.to_double();
  switch (dtype) {
    case DType::Float64:
      return x;
    case DType::Float16:
      return to_float(to_half(static_cast<float>(x)));
    case DType::BFloat16:
      return to_float(to_bfloat16(static_cast<float>(x)));
    case DType::Bool:
      return x != 0;
    default:
      return static_cast<float>(x);
  }
}

class Writer {
 public:
  explicit Writer(const Chain& chain)
      : chain_(chain), lanes_(chain.width > 1 ? 2 : 1), values_(chain.operands.size()) {}

  ChainSource write() {
    for (const ChainStep& step : chain_.steps) write_step(step);
    std::string loads, stores, declared, results;
    for (size_t i = 0; i < chain_.operands.size(); ++i) {
      const ChainOperand& o = chain_.operands[i];
      if (o.place < 0) continue;
      if (o.read_first) load(i, o, declared, loads);
      if (o.written) {
        check(o.walk != Walk::Single && o.walk != Walk::Column,
              "_fused_pointwise: an output is one place for several elements");
        results += str("    Piece<", dtype_tag(o.dtype), ", V> o", i, ";\n");
        stores += str("    o", i, ".store(p.data[", o.place, "] + ", offset(o),
                      chain_.rows ? "" : ", count", ");\n");
        set_ += str("      o", i, ".set(k, ", values_[i], ");\n");
        if (!chain_.rows)
          whole_stores_ += str("      o", i, ".store(p.data[", o.place, "] + ", offset(o), ");\n");
      }
    }
    ChainSource out;
    out.name = name();
    out.numbers = std::move(numbers_);
    out.text =
        str("namespace vt::cuda {\n"
            "extern \"C\" __global__ void __launch_bounds__(",
            kChainBlock, ") ", out.name,
            "(const __grid_constant__ Arguments p) {\n"
            "  constexpr int V = ",
            chain_.width, ", U = ", chain_.unroll, ", L = ", lanes_,
            ";\n"
            "  const u32 base = blockIdx.x * (",
            kChainBlock, " * U) + threadIdx.x;\n", fixed_, declared);
    if (chain_.rows) {
      for (const ChainOperand& o : chain_.operands) {
        if (by_rows(o)) out.text += str("  i64 at", o.place, "[U];\n");
      }
    }
    out.text +=
        str("#pragma unroll\n"
            "  for (int u = 0; u < U; ++u) {\n",
            kPlace);
    if (chain_.rows) {
      out.text += rows() + loads;
    } else {
      out.text += "    const u32 count = p.n - first;\n    if (count >= V) {\n" + whole_loads_ +
                  "    } else {\n" + loads + "    }\n";
    }
    out.text +=
        str("  }\n"
            "#pragma unroll\n"
            "  for (int u = 0; u < U; ++u) {\n",
            kPlace, results,
            "#pragma unroll\n"
            "    for (int k = 0; k < V; k += L) {\n",
            steps_, set_, "    }\n");
    if (chain_.rows)
      out.text += stores;
    else
      out.text += "    const u32 count = p.n - first;\n    if (count >= V) {\n" + whole_stores_ +
                  "    } else {\n" + stores + "    }\n";
    out.text += "  }\n}\n}  // namespace vt::cuda\n";
    return out;
  }

 private:
  static constexpr std::string_view kPlace =
      "    const u32 i = base + u * 256, first = i * V;\n"
      "    if (first >= p.n) break;\n";

  std::string name() const {
    constexpr size_t kLongest = 80;
    std::string text = "chain";
    for (const ChainStep& step : chain_.steps) {
      std::string_view op = op_name(step.id);
      while (op.starts_with('_')) op.remove_prefix(1);
      if (text.size() + op.size() > kLongest) return text + "_and_more";
      text += str("_", op);
    }
    return text;
  }
  static bool by_rows(const ChainOperand& o) {
    return o.walk == Walk::Row || o.walk == Walk::Column || o.walk == Walk::Strided;
  }
  std::string offset(const ChainOperand& o) const {
    if (by_rows(o)) return str("at", o.place, "[u]");
    return str("i64{first} * ", o.size);
  }

  /// How far each operand is at a piece: by its row, and by its place in it.
  std::string rows() const {
    std::string text;
    const size_t dims = chain_.shape.size() - (chain_.width > 1 ? 1 : 0);
    check(dims <= kChainRowDims, "_fused_pointwise: ", dims, " dimensions");
    if (chain_.width > 1) {
      text +=
          "    const u32 row = p.pieces.divide(i);\n"
          "    const i64 column = i64{i - row * p.pieces.divisor} * V;\n";
    } else {
      text += "    const u32 row = i;\n";
    }
    std::string rest = "row";
    for (size_t d = 0; d < dims; ++d) {
      if (d + 1 == dims) {
        text += str("    const i64 h", d, " = ", rest, ";\n");
        break;
      }
      text += str("    const u32 r", d, " = p.extent[", d, "].divide(", rest, ");\n");
      text += str("    const i64 h", d, " = ", rest, " - r", d, " * p.extent[", d, "].divisor;\n");
      rest = str("r", d);
    }
    for (const ChainOperand& o : chain_.operands) {
      if (!by_rows(o)) continue;
      text += str("    at", o.place, "[u] = ");
      if (o.walk == Walk::Row)
        text += str("column * ", o.size);
      else
        text += "0";
      for (size_t d = 0; d < dims; ++d)
        text += str(" + h", d, " * p.stride[", o.place, "][", d, "]");
      text += ";\n";
    }
    return text;
  }

  void load(size_t i, const ChainOperand& o, std::string& declared, std::string& loads) {
    const std::string_view tag = dtype_tag(o.dtype);
    if (o.walk == Walk::Single) {
      fixed_ += str("  const ", value_type(o.dtype), " f", i, " = load_one<", tag, ">(p.data[",
                    o.place, "]);\n");
    } else if (o.walk == Walk::Column) {
      declared += str("  ", value_type(o.dtype), " c", i, "[U];\n");
      loads +=
          str("    c", i, "[u] = load_one<", tag, ">(p.data[", o.place, "] + ", offset(o), ");\n");
    } else {
      declared += str("  Piece<", tag, ", V> m", i, "[U];\n");
      const std::string from = str("m", i, "[u].load(p.data[", o.place, "] + ", offset(o));
      if (chain_.rows) {
        loads += "    " + from + ");\n";
      } else {
        loads += "      " + from + ", count);\n";
        whole_loads_ += "      " + from + ");\n";
      }
    }
  }

  /// An operand's value in lane j, as it is now.
  std::string value(int operand) {
    const auto i = static_cast<size_t>(operand);
    const ChainOperand& o = chain_.operands[i];
    if (values_[i].empty()) {
      if (o.walk == Walk::Single) return str("f", i);
      if (o.walk == Walk::Column) return str("c", i, "[u]");
      values_[i] = str("v", i);
      steps_ += str("      ", value_type(o.dtype), " v", i, "[L];\n      m", i, "[u].get(k, v", i,
                    ");\n");
    }
    return values_[i] + "[j]";
  }
  std::string number(double x, std::string_view type) {
    check(numbers_.size() < kChainNumbers, "_fused_pointwise: more than ", kChainNumbers,
          " numbers");
    const size_t slot = numbers_.size();
    numbers_.push_back(x);
    fixed_ +=
        str("  const ", type, " n", slot, " = static_cast<", type, ">(p.number[", slot, "]);\n");
    return str("n", slot);
  }
  /// An operand as an op that computes in `compute` reads it.
  std::string input(int operand, DType compute) {
    const ChainOperand& o = chain_.operands[static_cast<size_t>(operand)];
    if (o.walk == Walk::Number) return number(number_as(o.number, compute), value_type(compute));
    std::string text = value(operand);
    if (o.dtype == compute) return text;
    if (compute == DType::Bool) return str("(", text, " != 0)");
    text = str("static_cast<", value_type(compute), ">(", text, ")");
    if (is_reduced_float(compute)) text = str(dtype_tag(compute), "::rounded(", text, ")");
    return text;
  }

  void write_step(const ChainStep& step) {
    std::string_view name = op_name(step.id);
    if (name.ends_with('_')) name.remove_suffix(1);
    const ChainOperand& out = chain_.operands[static_cast<size_t>(step.out)];
    DType compute = step.compute;
    bool test = false;
    std::string text = by_type(name, step, out, compute);
    if (text.empty()) text = by_form(name, step, compute, test);
    const std::string made = str("x", made_++);
    const std::string_view type = value_type(out.dtype), from = test ? "bool" : value_type(compute);
    if (type != from) {
      text = out.dtype == DType::Bool ? str("(", text, ") != 0")
                                      : str("static_cast<", type, ">(", text, ")");
    }
    steps_ += str("      ", type, " ", made,
                  "[L];\n#pragma unroll\n      for (int j = 0; j < L; ++j) {\n",
                  "        using C = ", value_type(compute), ";\n        ", made, "[j] = ", text,
                  ";\n      }\n");
    steps_ += str("      ", dtype_tag(out.dtype), "::round(", made, ");\n");
    values_[static_cast<size_t>(step.out)] = made;
  }

  static void expect(const ChainStep& step, std::string_view name, size_t inputs,
                     size_t attributes) {
    check(step.inputs.size() == inputs && step.attributes.size() >= attributes,
          "_fused_pointwise: ", name, " of ", step.inputs.size(), " operands and ",
          step.attributes.size(), " numbers");
  }

  /// Ops with numbers of their own, and those that are not of the kind pointwise.
  std::string by_type(std::string_view name, const ChainStep& step, const ChainOperand& out,
                      DType& compute) {
    const auto as_stored = [&] {
      compute = is_reduced_float(out.dtype) ? DType::Float32 : out.dtype;
    };
    if (name == "_to_dtype" || name == "clone" || name == "copy") {
      expect(step, name, 1, 0);
      // A value passes as the source's compute type and is converted once.
      const ChainOperand& in = chain_.operands[static_cast<size_t>(step.inputs[0])];
      compute = is_reduced_float(in.dtype) ? DType::Float32 : in.dtype;
      if (in.walk == Walk::Number) as_stored();
      return input(step.inputs[0], compute);
    }
    if (name == "_where") {
      expect(step, name, 3, 0);
      as_stored();
      const std::string condition = input(step.inputs[0], DType::Bool);
      const std::string a = input(step.inputs[1], compute), b = input(step.inputs[2], compute);
      return str(condition, " ? ", a, " : ", b);
    }
    if (name == "_dropout_backward") {
      expect(step, name, 2, 1);
      as_stored();
      const std::string scale = number(number_as(step.attributes[0], compute), value_type(compute));
      const std::string g = input(step.inputs[0], compute);
      return str(input(step.inputs[1], DType::Bool), " ? times(", g, ", ", scale, ") : C(0)");
    }
    if (name == "add" || name == "sub") {
      expect(step, name, 2, 1);
      check(is_floating(compute), "_fused_pointwise: ", name, " of ", compute);
      const double alpha = step.attributes[0].to_double() * (name == "sub" ? -1 : 1);
      const std::string a = input(step.inputs[0], compute), b = input(step.inputs[1], compute);
      if (alpha == 1) return str("plus(", a, ", ", b, ")");
      const double scale = compute == DType::Float64 ? alpha : double{static_cast<float>(alpha)};
      return str("times_plus(", number(scale, value_type(compute)), ", ", b, ", ", a, ")");
    }
    if (name == "gelu" || name == "gelu_backward") {
      const bool backward = name != "gelu";
      expect(step, name, backward ? 2 : 1, 1);
      const std::string_view slope = backward ? "_slope" : "";
      const ShortString approximate(step.attributes[0].to_int());
      const std::string_view form = approximate.view() == "tanh" ? "gelu_tanh" : "gelu";
      const std::string first = input(step.inputs[0], compute);
      if (!backward) return str(form, "(", first, ")");
      return str("times(", first, ", ", form, slope, "(", input(step.inputs[1], compute), "))");
    }
    if (name == "threshold_backward") {
      expect(step, name, 2, 1);
      const std::string g = input(step.inputs[0], compute), x = input(step.inputs[1], compute);
      const double limit = step.attributes[0].to_double();
      return str(x, " <= ",
                 number(compute == DType::Float64 ? limit : double{static_cast<float>(limit)},
                        value_type(compute)),
                 " ? C(0) : ", g);
    }
    if (name == "pow") {
      expect(step, name, 2, 0);
      const ChainOperand& e = chain_.operands[static_cast<size_t>(step.inputs[1])];
      const std::string x = input(step.inputs[0], compute);
      const double exponent = e.walk == Walk::Number ? e.number.to_double() : 0;
      if (exponent == 1) return x;
      if (exponent == 2) return str("times(", x, ", ", x, ")");
      if (exponent == 3) return str("times(times(", x, ", ", x, "), ", x, ")");
      if (exponent == 0.5) return str("root(", x, ")");
      if (exponent == -0.5) return str("quotient(C(1), root(", x, "))");
      if (exponent == -1) return str("quotient(C(1), ", x, ")");
      if (exponent == -2) return str("quotient(C(1), times(", x, ", ", x, "))");
      return str("apart(pow(", x, ", ", input(step.inputs[1], compute), "))");
    }
    return {};
  }

  std::string by_form(std::string_view name, const ChainStep& step, DType compute, bool& test) {
    const auto* form = std::find_if(std::begin(kForms), std::end(kForms),
                                    [&](const Form& f) { return f.name == name; });
    check(form != std::end(kForms), "_fused_pointwise: ", name, " is no part of chains on a GPU");
    expect(step, name, static_cast<size_t>(form->inputs), 0);
    check(is_floating(compute) || (form->test && compute == DType::Bool),
          "_fused_pointwise: ", name, " of ", compute);
    test = form->test;
    std::array<std::string, 2> inputs;
    for (size_t i = 0; i < step.inputs.size(); ++i) inputs[i] = input(step.inputs[i], compute);
    std::string out;
    for (size_t at = 0; at < form->text.size(); ++at) {
      if (form->text[at] == '$')
        out += inputs[static_cast<size_t>(form->text[++at] - '0')];
      else
        out += form->text[at];
    }
    return out;
  }

  const Chain& chain_;
  int lanes_, made_ = 0;
  std::vector<std::string> values_;  // arrays of the values that operands have now
  std::vector<double> numbers_;
  std::string fixed_, steps_, set_, whole_loads_, whole_stores_;
};

}  // namespace

ChainSource chain_source(const Chain& chain) { return Writer(chain).write(); }

const std::string& chain_prelude() {
  static const std::string* text = new std::string(str(kActivationMath, "\n", kChainPrelude));
  return *text;
}

}  // namespace vt::cuda
