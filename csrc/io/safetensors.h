// Safetensors: 8 bytes of little-endian header length, a JSON header, then the bytes of all tensors
// one after another. This layer knows names, dtypes, shapes and byte ranges; it knows no Tensor.
//
// Reading allocates in proportion to the header only and never touches tensor bytes, so a hostile
// file costs nothing but its named error. The header has a fixed depth (three levels), so the
// parser does not recurse.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/safetensors_error.h"

namespace vt::io {

/// In the order of the format: increasing alignment. Files list tensors by descending dtype.
enum class SafetensorDtype : uint8_t {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64,
};

std::string_view dtype_code(SafetensorDtype dtype);
std::optional<SafetensorDtype> dtype_from_code(std::string_view code);
int bits_of(SafetensorDtype dtype);

using Metadata = std::vector<std::pair<std::string, std::string>>;

/// A tensor of the header; begin and end are relative to the first byte after the header.
struct TensorInfo {
  std::string name;
  SafetensorDtype dtype = SafetensorDtype::U8;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct SafetensorHeader {
  std::vector<TensorInfo> tensors;  // by offset
  std::optional<Metadata> metadata;
  uint64_t data_start = 0;  // where in the file offset 0 is
};

inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;

/// Bytes that `shape` × `dtype` takes; faults ShapeOverflow and MisalignedSize name the tensor.
uint64_t checked_byte_size(std::string_view name, SafetensorDtype dtype,
                           std::span<const int64_t> shape);

/// Checks a whole file (or bytes in memory) against every rule of the format and returns its
/// header.
SafetensorHeader read_header(std::span<const std::byte> file);

/// A tensor to be written: `bytes` is its contiguous row-major data and outlives the call.
struct TensorBytes {
  std::string name;
  SafetensorDtype dtype = SafetensorDtype::U8;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

/// Sorts `tensors` into file order (descending dtype, then name) and returns the length and header
/// bytes, padded with spaces to 8. Metadata is written in key order, so equal input gives equal
/// files.
std::string write_header(std::vector<TensorBytes>& tensors,
                         const std::optional<Metadata>& metadata);

/// Writes `path` so that it is either the old file or the whole new one, whatever fails meanwhile:
/// streamed to a temporary file beside it, fsync, rename, fsync of the folder.
/// Errors: SafetensorError for illegal input, std::system_error from the file system.
void save_safetensors(const std::string& path, std::vector<TensorBytes> tensors,
                      const std::optional<Metadata>& metadata);

/// The same bytes in memory.
std::string serialize_safetensors(std::vector<TensorBytes> tensors,
                                  const std::optional<Metadata>& metadata);

}  // namespace vt::io
