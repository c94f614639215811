#include "io/file_engine.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "common/aligned_buffer.h"
#include "common/check.h"
#include "common/forked.h"

namespace offload::io {

namespace {

[[noreturn]] void raise_errno(int code, const std::string& message) {
  throw std::system_error(code, std::generic_category(), message);
}

// What direct transfers are cut at. See [Note: any alignment].
std::size_t direct_step(Op op, const File& file) {
  if (op == Op::read) return file.alignment;
  constexpr std::size_t most = 65536;  // of a network file system it is what one request carries
  struct stat about {};
  const std::size_t block = ::fstat(file.descriptor, &about) == 0 ? static_cast<std::size_t>(about.st_blksize) : 0;
  return std::max({file.alignment, kPageNbytes, std::min(block, most)});
}

bool on_boundaries(const File& file, std::size_t step, const void* address, std::uint64_t offset) {
  return offset % step == 0 && reinterpret_cast<std::uintptr_t>(address) % file.alignment == 0;
}

int open_file(Op op, const char* path, bool direct) {
  const int flags = (op == Op::read ? O_RDONLY : O_RDWR | O_CREAT) | O_CLOEXEC | (direct ? O_DIRECT : 0);
  return ::open(path, flags, 0644);
}

// Null where the file system has no direct I/O.
std::shared_ptr<const File> opened(Op op, const char* open_as, const std::string& path, bool direct) {
  const int descriptor = open_file(op, open_as, direct);
  if (descriptor < 0 && direct && errno == EINVAL) return nullptr;  // tmpfs and some network file systems
  if (descriptor < 0) raise_errno(errno, "cannot open " + path);
  return std::make_shared<File>(descriptor, path, direct ? direct_alignment(descriptor) : 1);
}

void check_length(int descriptor, const std::string& path, std::size_t nbytes, std::uint64_t offset) {
  struct stat about {};  // lseek would move the descriptor's position, which may be the caller's too
  std::uint64_t end = 0;
  if (::fstat(descriptor, &about) != 0) raise_errno(errno, "cannot find the end of " + path);
  if (S_ISREG(about.st_mode))
    end = static_cast<std::uint64_t>(about.st_size);
  else if (!S_ISBLK(about.st_mode))
    raise_errno(ESPIPE, "cannot find the end of " + path);
  else if (::ioctl(descriptor, BLKGETSIZE64, &end) != 0)
    raise_errno(errno, "cannot find the end of " + path);
  if (end < offset || end - offset < nbytes)
    raise_errno(EIO, path + " has " + std::to_string(end) + " bytes, " + std::to_string(offset + nbytes) +
                         " are to be read: it is not complete");
}

}  // namespace

File::~File() { ::close(descriptor); }

FileEngine::FileEngine(FileEngineOptions options) : options_(std::move(options)), owner_pid_(::getpid()) {
  OFFLOAD_CHECK(options_.block_nbytes >= 512 && options_.block_nbytes <= (std::size_t{1} << 30),
                "block_nbytes must be 512 to 1 GiB");
  OFFLOAD_CHECK(options_.queue_depth >= 1 && options_.queue_depth <= 4096, "queue_depth must be 1 to 4096");
  OFFLOAD_CHECK(options_.backend == "auto" || options_.backend == "uring" || options_.backend == "posix",
                "backend must be auto, uring or posix");
  const BackendOptions backend_options{"", -1, true, options_.queue_depth, options_.faults};
  backend_name_ = "uring";
  if (options_.backend != "posix") backend_ = make_uring_backend(backend_options, backend_reason_);
  if (backend_) return;
  if (options_.backend == "uring") raise_errno(ENOSYS, "backend=uring refused: " + backend_reason_);
  backend_ = make_posix_backend(backend_options);
  backend_name_ = "posix";
}

FileEngine::~FileEngine() { close(); }

std::shared_ptr<Ticket> FileEngine::submit(Op op, const std::string& path, void* address, std::size_t nbytes,
                                           std::uint64_t offset) {
  refuse_forked(owner_pid_);
  FilePtr direct = opened(op, path.c_str(), path, true);
  const std::size_t step = direct ? direct_step(op, *direct) : 1;
  const bool whole = direct && on_boundaries(*direct, step, address, offset) && nbytes % step == 0;
  const FilePtr cached = whole ? nullptr : opened(op, path.c_str(), path, false);
  if (op == Op::read) check_length((whole ? direct : cached)->descriptor, path, nbytes, offset);
  return start(op, direct, cached, static_cast<char*>(address), nbytes, offset);
}

std::shared_ptr<Ticket> FileEngine::submit(Op op, int descriptor, void* address, std::size_t nbytes,
                                           std::uint64_t offset) {
  refuse_forked(owner_pid_);
  const std::string path = "file descriptor " + std::to_string(descriptor);
  const int flags = ::fcntl(descriptor, F_GETFL);
  const int own = flags < 0 ? -1 : ::fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (own < 0) raise_errno(errno, path + " cannot be used");
  const bool is_direct = (flags & O_DIRECT) != 0;
  const FilePtr file = std::make_shared<File>(own, path, is_direct ? direct_alignment(own) : 1);
  if (op == Op::read) check_length(own, path, nbytes, offset);
  if (!is_direct) return start(op, nullptr, file, static_cast<char*>(address), nbytes, offset);
  const std::string again = "/proc/self/fd/" + std::to_string(own);
  return start(op, file, opened(op, again.c_str(), path, false), static_cast<char*>(address), nbytes, offset);
}

// See [Note: any alignment].
std::shared_ptr<Ticket> FileEngine::start(Op op, const FilePtr& direct, const FilePtr& cached, char* address,
                                          std::size_t nbytes, std::uint64_t offset) {
  OFFLOAD_CHECK(nbytes == 0 || address != nullptr, "a transfer needs an address");
  std::size_t head = 0;
  const std::size_t step = direct ? direct_step(op, *direct) : 1;
  if (direct && on_boundaries(*direct, step, address, offset)) head = nbytes / step * step;
  std::vector<Piece> pieces;
  cut(op, direct, address, head, offset, pieces);
  cut(op, cached, address + head, nbytes - head, offset + head, pieces);
  auto ticket = std::make_shared<Ticket>(std::max<std::size_t>(1, pieces.size()));
  if (pieces.empty()) ticket->settle_piece({});
  for (Piece& piece : pieces) piece.ticket = ticket;
  backend_->submit(std::move(pieces));
  return ticket;
}

void FileEngine::cut(Op op, const FilePtr& file, char* address, std::size_t nbytes, std::uint64_t offset,
                     std::vector<Piece>& pieces) const {
  if (nbytes == 0) return;
  const std::size_t step = (options_.block_nbytes + file->alignment - 1) / file->alignment * file->alignment;
  for (std::size_t at = 0; at < nbytes; at += step) {
    Piece piece{op, address + at, std::min(step, nbytes - at), offset + at, nullptr};
    piece.file = file;
    pieces.push_back(std::move(piece));
  }
}

bool FileEngine::inherited() const { return ::getpid() != owner_pid_; }

void FileEngine::close() {
  if (inherited()) return;
  std::lock_guard<std::mutex> lock(close_mutex_);
  if (closed_) return;
  closed_ = true;
  backend_->close();
}

}  // namespace offload::io
