// Transfers from and to any file, each opened for its transfer: one backend, bytes at any alignment.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "io/backend.h"

namespace offload::io {

struct FileEngineOptions {
  std::string backend = "auto";
  std::size_t block_nbytes = std::size_t{1} << 20;
  unsigned queue_depth = 32;
  std::shared_ptr<Faults> faults;
};

// [Note: any alignment] What lies on the boundaries that the file system asks for goes with O_DIRECT. The rest (a
// ragged end, or everything where memory or offset are off) goes through the page cache of the same file, which the
// kernel keeps coherent with direct transfers that have ended. Both at once in one block of the file system it does
// not: it fails the next fsync. So a direct write is made of whole blocks, as they are cached.
class FileEngine {
 public:
  explicit FileEngine(FileEngineOptions options);
  ~FileEngine();
  FileEngine(const FileEngine&) = delete;
  FileEngine& operator=(const FileEngine&) = delete;

  // Starts one transfer; never blocks on the device. A file to be written is made if it is not there, and keeps what it
  // has outside the range. Throws std::system_error when it cannot be opened, or ends before the range to be read, and
  // in a forked process.
  std::shared_ptr<Ticket> submit(Op op, const std::string& path, void* address, std::size_t nbytes,
                                 std::uint64_t offset);
  // The same on a descriptor of the caller's, who may close it at once.
  std::shared_ptr<Ticket> submit(Op op, int descriptor, void* address, std::size_t nbytes, std::uint64_t offset);
  // Finishes what is in flight. Any thread, any number of times.
  void close();
  // True in a process that was forked from the engine's: threads and transfers are the parent's.
  bool inherited() const;

  const std::string& backend() const { return backend_name_; }
  const std::string& backend_reason() const { return backend_reason_; }
  const Counters& counters() const { return backend_->counters(); }

 private:
  using FilePtr = std::shared_ptr<const File>;
  std::shared_ptr<Ticket> start(Op op, const FilePtr& direct, const FilePtr& cached, char* address, std::size_t nbytes,
                                std::uint64_t offset);
  void cut(Op op, const FilePtr& file, char* address, std::size_t nbytes, std::uint64_t offset,
           std::vector<Piece>& pieces) const;

  FileEngineOptions options_;
  std::string backend_name_, backend_reason_;
  const int owner_pid_;
  std::mutex close_mutex_;
  bool closed_ = false;
  std::unique_ptr<Backend> backend_;
};

}  // namespace offload::io
