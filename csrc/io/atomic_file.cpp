#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

namespace vt::io {
namespace {

[[noreturn]] void fail_with(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

int open_retrying(const char* path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = ::open(path, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path), target_(path) {
  if (char* const real = ::realpath(path.c_str(), nullptr)) {
    target_ = real;
    std::free(real);
  }
  struct stat old = {};
  const bool there = ::stat(target_.c_str(), &old) == 0;
  if (there && !S_ISREG(old.st_mode) && !S_ISDIR(old.st_mode)) {
    fd_ = open_retrying(target_.c_str(), O_WRONLY);
    if (fd_ < 0) fail("cannot open");
    return;
  }
  const std::size_t slash = target_.rfind('/');
  folder_ = slash == target_.npos ? "." : slash == 0 ? "/" : target_.substr(0, slash);
  const std::string name = slash == target_.npos ? target_ : target_.substr(slash + 1);
  // O_EXCL makes a name ours alone; the loop steps over what a killed process left.
  static std::atomic<unsigned> count{0};
  for (int attempt = 0; attempt < 1000; ++attempt) {
    temporary_ = folder_ + "/." + name + "." + std::to_string(::getpid()) + "-" +
                 std::to_string(count++) + ".tmp";
    fd_ = open_retrying(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (fd_ >= 0 || errno != EEXIST) break;
  }
  if (fd_ < 0) {
    const int error = errno;
    temporary_.clear();
    fail_with(error, "cannot create a file beside '" + path_ + "'");
  }
  // Best effort: some file systems have no permissions.
  if (there && S_ISREG(old.st_mode)) static_cast<void>(::fchmod(fd_, old.st_mode & 07777));
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* what) const {
  fail_with(errno, std::string(what) + " '" + path_ + "'");
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  constexpr std::size_t chunk = std::size_t{1} << 30;  // one write() moves below 2 GiB
  while (!bytes.empty()) {
    const ssize_t done = ::write(fd_, bytes.data(), std::min(bytes.size(), chunk));
    if (done < 0) {
      if (errno == EINTR) continue;
      fail("cannot write");
    }
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
}

void AtomicFile::commit() {
  if (!temporary_.empty() && ::fsync(fd_) != 0) fail("cannot sync");
  if (const int fd = std::exchange(fd_, -1); ::close(fd) != 0) fail("cannot close");
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("cannot rename into");
  temporary_.clear();
  // Some file systems refuse to sync a folder; the file itself is whole in any case.
  if (const int fd = open_retrying(folder_.c_str(), O_RDONLY | O_DIRECTORY); fd >= 0) {
    ::fsync(fd);
    ::close(fd);
  }
}

MappedFile::MappedFile(const std::string& path) {
  const int fd = open_retrying(path.c_str(), O_RDONLY | O_NONBLOCK);  // a FIFO must not hang us
  if (fd < 0) fail_with(errno, "cannot open '" + path + "'");
  struct stat status = {};
  int error = ::fstat(fd, &status) != 0 ? errno : 0;
  if (!error && !S_ISREG(status.st_mode)) error = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
  size_ = static_cast<std::size_t>(status.st_size);
  if (!error && size_ > 0) {  // an empty mapping is not allowed
    void* data = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (data == MAP_FAILED) {
      error = errno;
    } else {
      data_ = static_cast<std::byte*>(data);
    }
  }
  ::close(fd);
  if (error) fail_with(error, "cannot map '" + path + "'");
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

}  // namespace vt::io
