// Every rule of the Safetensors format that a file or a save can break, each by its own name. The
// bindings make one Python exception class a kind, all deriving from SafetensorError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vt::io {

enum class SafetensorFault : uint8_t {
  HeaderTooSmall,       // fewer than the 8 bytes of the header length
  HeaderTooLarge,       // header length above 100 MB
  InvalidHeaderLength,  // header length reaches past the end of the file
  InvalidHeaderStart,   // header does not begin with '{'
  InvalidHeaderUtf8,
  InvalidHeaderJson,
  InvalidHeaderPadding,  // something other than spaces after the JSON object
  DuplicateKey,
  InvalidMetadata,    // __metadata__ is not a map from strings to strings
  InvalidTensorInfo,  // an entry is not {"dtype": str, "shape": [int…], "data_offsets": [int, int]}
  UnknownDtype,
  ShapeOverflow,     // shape × dtype leaves 63 bits
  MisalignedSize,    // a sub-byte dtype whose elements do not fill whole bytes
  InvalidOffsets,    // begin > end, or the first tensor does not begin at 0
  DataHole,          // bytes that belong to no tensor
  DataOverlap,       // bytes that belong to two tensors
  SizeMismatch,      // shape × dtype is not end − begin
  IncompleteBuffer,  // the file ends before the last tensor does
  TrailingData,      // the file goes on after the last tensor
  TensorNotFound,
  UnsupportedDtype,  // a legal file, but no tensor type here holds this dtype
  SharedStorage,     // tensors to save overlap in memory without being one tensor
  InvalidIndex,      // *.index.json is malformed or disagrees with its shards
};
inline constexpr int kNumSafetensorFaults = static_cast<int>(SafetensorFault::InvalidIndex) + 1;

/// "HeaderTooSmall", …: also the name of the Python class.
const char* fault_name(SafetensorFault fault);

class SafetensorError : public std::runtime_error {
 public:
  SafetensorError(SafetensorFault fault, const std::string& message)
      : std::runtime_error(message), fault_(fault) {}
  SafetensorFault fault() const { return fault_; }

 private:
  SafetensorFault fault_;
};

}  // namespace vt::io
