// One backend moves the bytes of one file. Pieces are at most one I/O block long.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "io/ticket.h"

namespace offload::io {

enum class Op { read, write };

// A file that is open for the pieces that hold it. `alignment` is what its transfers start on.
struct File {
  File(int descriptor_, std::string path_, std::size_t alignment_)
      : descriptor(descriptor_), path(std::move(path_)), alignment(alignment_) {}
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const int descriptor;
  const std::string path;
  const std::size_t alignment;
};

// What direct transfers on the file need of memory, offset and length; a page where the kernel does not say (before
// Linux 6.1).
std::size_t direct_alignment(int descriptor);

struct Piece {
  Op op;
  char* address;
  std::size_t nbytes;
  std::uint64_t offset;
  std::shared_ptr<Ticket> ticket;
  bool urgent = false;
  unsigned attempts = 0;
  std::shared_ptr<const File> file{};  // null: the backend's own
};

// What a write has replaced, until it is known to be on the drive.
struct UnsyncedWrite {
  int descriptor;
  std::uint64_t offset;
  std::vector<char> before;
};

// Faults for tests: they change the kernel's result of a real transfer, so that the code under test is the real code.
// What the changed result says has not been moved is overwritten with NaNs, in memory or in the file.
struct Faults {
  std::uint64_t fail_nth = 0;    // 1-based count of transfers of the chosen kind; 0: never
  std::uint64_t fail_count = 1;  // so many in a row, from that one on
  int error = 5;
  std::uint64_t delay_ms = 0;  // a slow drive: every result comes this late
  double bytes_per_s = 0;      // a drive of this rate, reads and writes together; 0: as fast as it is
  std::uint64_t short_every = 0;
  std::size_t short_nbytes = 4096;
  bool reads = true;
  bool writes = true;
  std::atomic<std::uint64_t> seen{0};
  // Power is lost at this transfer or sync (0: never): of everything written since the last sync a random part, page by
  // page, becomes what it was before, and the process ends. 64-bit seed.
  std::uint64_t power_loss_nth = 0, seed = 0;
  std::atomic<std::uint64_t> events{0};
  // The drive has room for this many distinct pages that have been written (0: no limit); a write beyond it fails.
  std::uint64_t quota_pages = 0;
  std::mutex mutex;
  std::chrono::steady_clock::time_point idle_from;  // when a drive of that rate has moved all it was given
  std::vector<UnsyncedWrite> unsynced;
  std::set<std::pair<int, std::uint64_t>> pages;  // (descriptor, page)
};

struct Counters {
  std::atomic<std::uint64_t> read_nbytes{0}, written_nbytes{0}, read_ops{0}, write_ops{0};
  std::atomic<std::uint64_t> submit_calls{0};   // calls that handed the kernel one transfer or a batch of them
  std::atomic<std::uint64_t> in_flight_max{0};  // the most transfers the kernel has had at once
};

struct BackendOptions {
  std::string path;
  int descriptor = -1;
  bool direct = true;
  unsigned queue_depth = 32;
  std::shared_ptr<Faults> faults;
};

class Backend {
 public:
  explicit Backend(BackendOptions options) : options_(std::move(options)) {}
  virtual ~Backend() = default;

  virtual void submit(std::vector<Piece> pieces) = 0;
  virtual bool register_buffer(char* address, std::size_t nbytes) = 0;
  // Fails what the kernel has not been given yet, and every later submission, with ECANCELED. Does not wait.
  virtual void cancel() = 0;
  // Finishes what was submitted, then stops the threads. Later submissions fail.
  virtual void close() = 0;

  // For simulated power loss: keep what a write is about to replace; forget it, for it is on the drive now.
  void remember(const Piece& piece);
  void synced();

  const Counters& counters() const { return counters_; }
  // From where another backend, whose work is over, has come to.
  void go_on_counting(const Backend& other);

 protected:
  // Takes the kernel's result. True when the piece has to go again (interrupted, or the rest of a short transfer).
  bool settle(Piece& piece, std::int64_t result);
  std::int64_t injected(const Piece& piece, std::int64_t result) const;
  void maybe_lose_power() const;
  bool over_quota(const Piece& piece) const;
  void wait_for_rate(std::int64_t nbytes) const;
  void fail(Piece& piece, int code, const std::string& what) const;
  // Its file is let go of first: whoever has waited may unmount the drive.
  static void end(Piece& piece, const Error& error);
  int descriptor_of(const Piece& piece) const { return piece.file ? piece.file->descriptor : options_.descriptor; }
  std::size_t alignment_of(const Piece& piece) const;
  void count_in_flight(std::uint64_t in_flight);  // from one thread at a time

  BackendOptions options_;
  Counters counters_;
};

// Null with `reason` filled when io_uring cannot be used here.
std::unique_ptr<Backend> make_uring_backend(const BackendOptions& options, std::string& reason);
std::unique_ptr<Backend> make_posix_backend(const BackendOptions& options);

}  // namespace offload::io
