// A strict pull parser for the JSON of a Safetensors header: objects, arrays, strings and unsigned
// integers are asked for where the format expects them, so nothing is ever nested deeper than the
// format allows and no tree is built. The text is valid UTF-8 before the parser sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace vt::io {

bool is_valid_utf8(std::string_view text);

/// `text` as a JSON string with its quotes; the escapes are the shortest ones, non-ASCII stays.
std::string json_quote(std::string_view text);

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  /// The next character that is not white space, '\0' at the end.
  char peek();
  /// Takes `expected` or faults InvalidHeaderJson.
  void expect(char expected);
  /// Takes `wanted` if it is next.
  bool take(char wanted);
  /// After a member or element: true to go on (a comma was taken), false at `close` (taken).
  bool more(char close);

  bool at_string() { return peek() == '"'; }
  std::string string();
  bool at_number() { return (peek() >= '0' && peek() <= '9') || peek() == '-'; }
  /// A non-negative integer below 2^63, without sign, fraction or exponent; `what` names it in the
  /// InvalidTensorInfo fault.
  int64_t integer(std::string_view what);
  /// Faults InvalidHeaderJson unless a JSON value can begin here.
  void require_value();

  std::size_t position() const { return at_; }
  [[noreturn]] void fault(std::string_view what) const;

 private:
  uint32_t hex4();
  void escape(std::string& out);

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace vt::io
