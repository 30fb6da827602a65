#include "io/json_reader.h"

#include <algorithm>
#include <limits>

#include "io/safetensors_error.h"

namespace vt::io {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | (code >> 6));
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | (code >> 12));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | (code >> 18));
    put(0x80 | ((code >> 12) & 0x3f));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

}  // namespace

bool is_valid_utf8(std::string_view text) {
  const std::size_t size = text.size();
  for (std::size_t i = 0; i < size;) {
    const auto lead = static_cast<unsigned char>(text[i]);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    const int tail = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    if (lead < 0xc2 || lead > 0xf4 || size - i <= static_cast<std::size_t>(tail)) return false;
    // The second byte rules out overlong forms, surrogates and codes above U+10FFFF.
    const auto second = static_cast<unsigned char>(text[i + 1]);
    const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (second < low || second > high) return false;
    for (int k = 2; k <= tail; ++k) {
      if ((static_cast<unsigned char>(text[i + static_cast<std::size_t>(k)]) & 0xc0) != 0x80)
        return false;
    }
    i += static_cast<std::size_t>(tail) + 1;
  }
  return true;
}

std::string json_quote(std::string_view text) {
  constexpr std::string_view hex = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        if (const auto byte = static_cast<unsigned char>(c); byte < 0x20) {
          out += "\\u00";
          out += hex[byte >> 4];
          out += hex[byte & 15];
        } else {
          out += c;
        }
    }
  }
  return out += '"';
}

void JsonReader::fault(std::string_view what) const {
  throw SafetensorError(
      SafetensorFault::InvalidHeaderJson,
      "invalid JSON in the header at byte " + std::to_string(at_) + ": " + std::string(what));
}

char JsonReader::peek() {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return c;
    ++at_;
  }
  return '\0';
}

bool JsonReader::take(char wanted) {
  if (at_ >= text_.size() || peek() != wanted) return false;
  ++at_;
  return true;
}

void JsonReader::expect(char expected) {
  if (!take(expected)) fault(std::string("expected '") + expected + "'");
}

bool JsonReader::more(char close) {
  if (take(close)) return false;
  if (!take(',')) fault(std::string("expected ',' or '") + close + "'");
  return true;
}

void JsonReader::require_value() {
  const char c = peek();
  if (c == '"' || c == '{' || c == '[' || at_number()) return;
  for (const std::string_view word : {"true", "false", "null"})
    if (text_.substr(at_).starts_with(word)) return;
  fault("expected a value");
}

uint32_t JsonReader::hex4() {
  if (text_.size() - at_ < 4) fault("a \\u escape is cut off");
  uint32_t code = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = text_[at_++];
    const char lower = static_cast<char>(c | 0x20);
    if (!is_digit(c) && (lower < 'a' || lower > 'f')) fault("a \\u escape needs four hex digits");
    code = code * 16 + static_cast<uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
  }
  return code;
}

void JsonReader::escape(std::string& out) {
  if (at_ == text_.size()) fault("an escape is cut off");
  switch (text_[at_++]) {
    case '"':
      out += '"';
      return;
    case '\\':
      out += '\\';
      return;
    case '/':
      out += '/';
      return;
    case 'b':
      out += '\b';
      return;
    case 'f':
      out += '\f';
      return;
    case 'n':
      out += '\n';
      return;
    case 'r':
      out += '\r';
      return;
    case 't':
      out += '\t';
      return;
    case 'u':
      break;
    default:
      fault("unknown escape");
  }
  uint32_t code = hex4();
  if (code >= 0xd800 && code < 0xe000) {
    if (code >= 0xdc00 || !text_.substr(at_).starts_with("\\u")) fault("a lone surrogate");
    at_ += 2;
    const uint32_t low = hex4();
    if (low < 0xdc00 || low >= 0xe000) fault("a lone surrogate");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  append_utf8(out, code);
}

std::string JsonReader::string() {
  expect('"');
  std::string out;
  while (true) {
    if (at_ == text_.size()) fault("a string is not closed");
    const char c = text_[at_++];
    if (c == '"') return out;
    if (c == '\\') {
      escape(out);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      fault("a control character inside a string");
    } else {
      out += c;
    }
  }
}

int64_t JsonReader::integer(std::string_view what) {
  const auto refuse = [&] {
    throw SafetensorError(SafetensorFault::InvalidTensorInfo,
                          std::string(what) + " must be whole numbers from 0 to 2^63 - 1");
  };
  require_value();
  if (!at_number() || text_[at_] == '-') refuse();
  const std::size_t start = at_;
  constexpr int64_t limit = std::numeric_limits<int64_t>::max();
  int64_t value = 0;
  while (at_ < text_.size() && is_digit(text_[at_])) {
    const int digit = text_[at_++] - '0';
    if (value > (limit - digit) / 10) refuse();
    value = value * 10 + digit;
  }
  if (text_[start] == '0' && at_ - start > 1) fault("a number begins with 0");
  if (at_ < text_.size() && (text_[at_] == '.' || (text_[at_] | 0x20) == 'e')) refuse();
  return value;
}

}  // namespace vt::io
