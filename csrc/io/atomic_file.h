// A file that appears whole or not at all, and a read-only file mapped into memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace vt::io {

/// Bytes go to a temporary file in the folder of `path`; commit() syncs it, renames it over `path`
/// and syncs the folder. A file that was there gives its permissions to the new one; where `path`
/// is a symbolic link to a file, that file is the one that is replaced. Without commit (an error,
/// an exception) the temporary is removed and `path` stays as it was. Only a killed process leaves
/// its temporary (".NAME.…tmp") behind. What is there and is no file (a device, a pipe) is written
/// as it is. Errors: std::system_error with the path.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void commit();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::string path_;    // as given, for errors
  std::string target_;  // what it leads to
  std::string folder_;
  std::string temporary_;
  int fd_ = -1;
};

/// The whole of a file, mapped copy-on-write: writes through bytes() stay in this process. The file
/// must not be truncated while mapped; AtomicFile never does, it puts a new file in the old one's
/// place. Errors: std::system_error with the path.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<std::byte> bytes() const { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace vt::io
