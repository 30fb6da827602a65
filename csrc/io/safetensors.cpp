#include "io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <tuple>
#include <unordered_set>

#include "io/atomic_file.h"
#include "io/json_reader.h"

namespace vt::io {
namespace {

using Fault = SafetensorFault;

struct DtypeRow {
  std::string_view code;
  int bits;
};
constexpr DtypeRow kDtypes[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};
static_assert(std::size(kDtypes) == static_cast<std::size_t>(SafetensorDtype::U64) + 1);

constexpr std::size_t kLengthBytes = 8;
constexpr std::string_view kMetadataKey = "__metadata__";

template <class... Parts>
[[noreturn]] void fault(Fault kind, const Parts&... parts) {
  std::string message;
  ((message += parts), ...);
  throw SafetensorError(kind, message);
}

std::string number(uint64_t value) { return std::to_string(value); }

std::string shape_text(std::span<const int64_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i == 8) return out + ", …]";  // an absurd rank would make an absurd message
    out.append(i ? ", " : "").append(std::to_string(shape[i]));
  }
  return out + "]";
}

/// For messages: a name from a hostile file may be long.
std::string quoted(std::string_view name) {
  if (name.size() > 200) return json_quote(name.substr(0, 200)) + "…";
  return json_quote(name);
}

uint64_t little_endian(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i)
    value |= std::to_integer<uint64_t>(bytes[i]) << (8 * i);
  return value;
}

Metadata read_metadata(JsonReader& json) {
  json.require_value();
  if (json.peek() != '{')
    fault(Fault::InvalidMetadata, "__metadata__ must be an object of strings");
  json.expect('{');
  Metadata metadata;
  std::unordered_set<std::string> seen;
  if (json.take('}')) return metadata;
  do {
    std::string key = json.string();
    json.expect(':');
    json.require_value();
    if (!json.at_string())
      fault(Fault::InvalidMetadata, "__metadata__ ", quoted(key), " must be a string");
    if (!seen.insert(key).second)
      fault(Fault::DuplicateKey, "__metadata__ has the key ", quoted(key), " twice");
    std::string value = json.string();
    metadata.emplace_back(std::move(key), std::move(value));
  } while (json.more('}'));
  return metadata;
}

std::vector<int64_t> read_integers(JsonReader& json, const std::string& what) {
  json.require_value();
  if (json.peek() != '[') fault(Fault::InvalidTensorInfo, what, " must be a list");
  json.expect('[');
  std::vector<int64_t> values;
  if (json.take(']')) return values;
  do {
    values.push_back(json.integer(what));
  } while (json.more(']'));
  return values;
}

TensorInfo read_tensor(JsonReader& json, std::string name) {
  const std::string who = "tensor " + quoted(name);
  json.require_value();
  if (json.peek() != '{')
    fault(Fault::InvalidTensorInfo, who, " must be an object with dtype, shape and data_offsets");
  json.expect('{');
  TensorInfo info;
  bool has_dtype = false;
  bool has_shape = false;
  bool has_offsets = false;
  const auto once = [&](bool& seen, const char* key) {
    if (std::exchange(seen, true))
      fault(Fault::DuplicateKey, who, " has the key \"", key, "\" twice");
  };
  if (!json.take('}')) {
    do {
      const std::string key = json.string();
      json.expect(':');
      if (key == "dtype") {
        once(has_dtype, "dtype");
        json.require_value();
        if (!json.at_string()) fault(Fault::InvalidTensorInfo, who, ": dtype must be a string");
        const std::string code = json.string();
        const auto dtype = dtype_from_code(code);
        if (!dtype) fault(Fault::UnknownDtype, who, " has the unknown dtype ", quoted(code));
        info.dtype = *dtype;
      } else if (key == "shape") {
        once(has_shape, "shape");
        info.shape = read_integers(json, who + ": sizes in shape");
      } else if (key == "data_offsets") {
        once(has_offsets, "data_offsets");
        const auto offsets = read_integers(json, who + ": data_offsets");
        if (offsets.size() != 2)
          fault(Fault::InvalidTensorInfo, who, ": data_offsets must be [begin, end]");
        info.begin = static_cast<uint64_t>(offsets[0]);
        info.end = static_cast<uint64_t>(offsets[1]);
      } else {
        fault(Fault::InvalidTensorInfo, who, " has the unknown key ", quoted(key));
      }
    } while (json.more('}'));
  }
  if (!has_dtype || !has_shape || !has_offsets)
    fault(Fault::InvalidTensorInfo, who, " lacks ",
          !has_dtype   ? "dtype"
          : !has_shape ? "shape"
                       : "data_offsets");
  info.name = std::move(name);
  return info;
}

/// The tensors, put in offset order, must tile [0, data_size) exactly.
void check_layout(std::vector<TensorInfo>& tensors, uint64_t data_size) {
  for (const auto& tensor : tensors) {
    const std::string who = "tensor " + quoted(tensor.name);
    if (tensor.begin > tensor.end)
      fault(Fault::InvalidOffsets, who, " begins at ", number(tensor.begin), " after its end at ",
            number(tensor.end));
    const uint64_t size = checked_byte_size(tensor.name, tensor.dtype, tensor.shape);
    if (size != tensor.end - tensor.begin)
      fault(Fault::SizeMismatch, who, " of shape ", shape_text(tensor.shape), " and dtype ",
            dtype_code(tensor.dtype), " needs ", number(size), " bytes, but data_offsets give ",
            number(tensor.end - tensor.begin));
  }
  // Empty tensors sort before the one that begins where they stand.
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t reached = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto& tensor = tensors[i];
    const std::string who = "tensor " + quoted(tensor.name);
    if (i == 0 && tensor.begin != 0)
      fault(Fault::InvalidOffsets, who, " comes first and must begin at 0, not at ",
            number(tensor.begin));
    if (tensor.begin < reached)
      fault(Fault::DataOverlap, who, " begins at ", number(tensor.begin), " inside ",
            quoted(tensors[i - 1].name), ", which ends at ", number(reached));
    if (tensor.begin > reached)
      fault(Fault::DataHole, "bytes ", number(reached), " to ", number(tensor.begin), " before ",
            who, " belong to no tensor");
    reached = tensor.end;
  }
  if (reached > data_size)
    fault(Fault::IncompleteBuffer, "the tensors need ", number(reached),
          " bytes, but the file holds only ", number(data_size), " after its header");
  if (reached < data_size)
    fault(Fault::TrailingData, "the file holds ", number(data_size - reached),
          " bytes after its last tensor");
}

}  // namespace

const char* fault_name(SafetensorFault fault) {
  static constexpr std::array<const char*, kNumSafetensorFaults> names = {
      "HeaderTooSmall",       "HeaderTooLarge",    "InvalidHeaderLength",
      "InvalidHeaderStart",   "InvalidHeaderUtf8", "InvalidHeaderJson",
      "InvalidHeaderPadding", "DuplicateKey",      "InvalidMetadata",
      "InvalidTensorInfo",    "UnknownDtype",      "ShapeOverflow",
      "MisalignedSize",       "InvalidOffsets",    "DataHole",
      "DataOverlap",          "SizeMismatch",      "IncompleteBuffer",
      "TrailingData",         "TensorNotFound",    "UnsupportedDtype",
      "SharedStorage",        "InvalidIndex",
  };
  return names[static_cast<std::size_t>(fault)];
}

std::string_view dtype_code(SafetensorDtype dtype) {
  return kDtypes[static_cast<std::size_t>(dtype)].code;
}

std::optional<SafetensorDtype> dtype_from_code(std::string_view code) {
  for (std::size_t i = 0; i < std::size(kDtypes); ++i)
    if (kDtypes[i].code == code) return static_cast<SafetensorDtype>(i);
  return std::nullopt;
}

int bits_of(SafetensorDtype dtype) { return kDtypes[static_cast<std::size_t>(dtype)].bits; }

uint64_t checked_byte_size(std::string_view name, SafetensorDtype dtype,
                           std::span<const int64_t> shape) {
  // Zero sizes are left out of the product: strides of [0, 2^40, 2^40] would overflow all the same.
  constexpr auto limit = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  auto bits = static_cast<uint64_t>(bits_of(dtype));
  bool empty = false;
  for (const int64_t size : shape) {
    empty |= size == 0;
    if (size > 0 && bits > limit / static_cast<uint64_t>(size))
      fault(Fault::ShapeOverflow, "tensor ", quoted(name), " of shape ", shape_text(shape),
            " and dtype ", dtype_code(dtype), " is larger than 2^63 bits");
    if (size > 0) bits *= static_cast<uint64_t>(size);
  }
  if (empty) return 0;
  if (bits % 8 != 0)
    fault(Fault::MisalignedSize, "tensor ", quoted(name), " of shape ", shape_text(shape),
          " and dtype ", dtype_code(dtype), " does not fill whole bytes");
  return bits / 8;
}

SafetensorHeader read_header(std::span<const std::byte> file) {
  if (file.size() < kLengthBytes)
    fault(Fault::HeaderTooSmall,
          "a Safetensors file begins with 8 bytes of header length, this has ", number(file.size()),
          " bytes");
  const uint64_t length = little_endian(file);
  if (length > kMaxHeaderBytes)
    fault(Fault::HeaderTooLarge, "the header claims ", number(length), " bytes; the limit is ",
          number(kMaxHeaderBytes));
  if (length > file.size() - kLengthBytes)
    fault(Fault::InvalidHeaderLength, "the header claims ", number(length), " bytes, but only ",
          number(file.size() - kLengthBytes), " follow");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  if (text.empty() || text[0] != '{')
    fault(Fault::InvalidHeaderStart, "the header must begin with '{'");
  if (!is_valid_utf8(text)) fault(Fault::InvalidHeaderUtf8, "the header is not valid UTF-8");

  SafetensorHeader header;
  header.data_start = kLengthBytes + length;
  std::unordered_set<std::string> seen;
  JsonReader json(text);
  json.expect('{');
  if (!json.take('}')) {
    do {
      std::string name = json.string();
      json.expect(':');
      if (!seen.insert(name).second)
        fault(Fault::DuplicateKey, "the header has the key ", quoted(name), " twice");
      if (name == kMetadataKey) {
        header.metadata = read_metadata(json);
      } else {
        header.tensors.push_back(read_tensor(json, std::move(name)));
      }
    } while (json.more('}'));
  }
  if (text.find_first_not_of(' ', json.position()) != text.npos)
    fault(Fault::InvalidHeaderPadding,
          "the header goes on after its JSON object; only spaces may pad");
  check_layout(header.tensors, file.size() - header.data_start);
  return header;
}

std::string write_header(std::vector<TensorBytes>& tensors,
                         const std::optional<Metadata>& metadata) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorBytes& a, const TensorBytes& b) {
    return a.dtype != b.dtype ? a.dtype > b.dtype : a.name < b.name;
  });
  std::string json = "{";
  if (metadata) {
    const std::set<std::pair<std::string, std::string>> ordered(metadata->begin(), metadata->end());
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : ordered) {
      if (!is_valid_utf8(key) || !is_valid_utf8(value))
        fault(Fault::InvalidMetadata, "__metadata__ must be valid UTF-8");
      if (json.back() != '{') json += ',';
      json += json_quote(key) + ":" + json_quote(value);
    }
    json += '}';
  }
  uint64_t offset = 0;
  std::unordered_set<std::string_view> seen;
  for (const auto& tensor : tensors) {
    if (tensor.name == kMetadataKey)
      fault(Fault::InvalidTensorInfo, "a tensor cannot be named \"__metadata__\"");
    if (!is_valid_utf8(tensor.name))
      fault(Fault::InvalidHeaderUtf8, "tensor names must be valid UTF-8");
    if (!seen.insert(tensor.name).second)
      fault(Fault::DuplicateKey, "two tensors are named ", quoted(tensor.name));
    const uint64_t size = checked_byte_size(tensor.name, tensor.dtype, tensor.shape);
    if (size != tensor.bytes.size())
      fault(Fault::SizeMismatch, "tensor ", quoted(tensor.name), " of shape ",
            shape_text(tensor.shape), " and dtype ", dtype_code(tensor.dtype), " needs ",
            number(size), " bytes, but ", number(tensor.bytes.size()), " were given");
    if (json.size() > 1) json += ',';
    json += json_quote(tensor.name) + ":{\"dtype\":\"" + std::string(dtype_code(tensor.dtype)) +
            "\",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i)
      json.append(i ? "," : "").append(std::to_string(tensor.shape[i]));
    json += "],\"data_offsets\":[" + number(offset) + "," + number(offset + size) + "]}";
    offset += size;
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');
  if (json.size() > kMaxHeaderBytes)
    fault(Fault::HeaderTooLarge, "the header would take ", number(json.size()),
          " bytes; the limit is ", number(kMaxHeaderBytes));
  std::string out(kLengthBytes, '\0');
  for (std::size_t i = 0; i < kLengthBytes; ++i)
    out[i] = static_cast<char>((json.size() >> (8 * i)) & 0xff);
  return out + json;
}

void save_safetensors(const std::string& path, std::vector<TensorBytes> tensors,
                      const std::optional<Metadata>& metadata) {
  const std::string header = write_header(tensors, metadata);
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(header)));
  for (const auto& tensor : tensors) file.write(tensor.bytes);
  file.commit();
}

std::string serialize_safetensors(std::vector<TensorBytes> tensors,
                                  const std::optional<Metadata>& metadata) {
  std::string out = write_header(tensors, metadata);
  for (const auto& tensor : tensors)
    out.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  return out;
}

}  // namespace vt::io
