// What every backend does with a result: error, short, or done.
#include "io/backend.h"

#include <fcntl.h>
#include <linux/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "common/aligned_buffer.h"

namespace offload::io {

namespace {
constexpr unsigned kAttemptsMax = 64;
constexpr int kPowerLossStatus = 137;
}  // namespace

std::size_t direct_alignment(int descriptor) {
#ifdef STATX_DIOALIGN
  struct statx about {};
  if (::syscall(SYS_statx, descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) == 0 &&
      (about.stx_mask & STATX_DIOALIGN) != 0 && about.stx_dio_offset_align != 0)
    return std::max<std::size_t>(about.stx_dio_mem_align, about.stx_dio_offset_align);
#else
  (void)descriptor;
#endif
  return kPageNbytes;
}

void Backend::fail(Piece& piece, int code, const std::string& what) const {
  const std::string verb = piece.op == Op::read ? "read" : "write";
  std::string remedy;
  if (code == ENOSPC) remedy = "; free space on this drive or add a storage directory";
  if (code == EIO) remedy = "; check the drive (dmesg, smartctl)";
  if (code == ENODEV || code == ENXIO || code == ESTALE) remedy = "; the drive is gone: check its connection (dmesg)";
  if (code == EROFS) remedy = "; the drive has become read-only: check it (dmesg)";
  end(piece, {code, verb + " of " + std::to_string(piece.nbytes) + " bytes at offset " + std::to_string(piece.offset) +
                        " of " + (piece.file ? piece.file->path : options_.path) + ": " + what + " (" +
                        std::strerror(code) + ")" + remedy});
}

void Backend::end(Piece& piece, const Error& error) {
  piece.file.reset();
  piece.ticket->settle_piece(error);
}

void Backend::count_in_flight(std::uint64_t in_flight) {
  if (in_flight > counters_.in_flight_max.load(std::memory_order_relaxed)) counters_.in_flight_max = in_flight;
}

void Backend::go_on_counting(const Backend& other) {
  counters_.read_nbytes += other.counters_.read_nbytes;
  counters_.written_nbytes += other.counters_.written_nbytes;
  counters_.read_ops += other.counters_.read_ops;
  counters_.write_ops += other.counters_.write_ops;
  counters_.submit_calls += other.counters_.submit_calls;
}

void Backend::remember(const Piece& piece) {
  Faults& faults = *options_.faults;
  if (faults.power_loss_nth == 0 || piece.op != Op::write) return;
  const AlignedBuffer held(piece.nbytes);
  if (::pread(options_.descriptor, held.address(), piece.nbytes, static_cast<off_t>(piece.offset)) < 0) return;
  const char* const begin = static_cast<const char*>(held.address());
  std::lock_guard<std::mutex> lock(faults.mutex);
  faults.unsynced.push_back({options_.descriptor, piece.offset, {begin, begin + piece.nbytes}});
}

void Backend::synced() {
  maybe_lose_power();
  Faults& faults = *options_.faults;
  std::lock_guard<std::mutex> lock(faults.mutex);
  faults.unsynced.erase(
      std::remove_if(faults.unsynced.begin(), faults.unsynced.end(),
                     [this](const UnsyncedWrite& write) { return write.descriptor == options_.descriptor; }),
      faults.unsynced.end());
}

void Backend::maybe_lose_power() const {
  Faults& faults = *options_.faults;
  if (faults.power_loss_nth == 0 || faults.events.fetch_add(1) + 1 != faults.power_loss_nth) return;
  std::lock_guard<std::mutex> lock(faults.mutex);  // kept: nobody writes any more
  std::mt19937_64 random(faults.seed);
  const double kept = std::uniform_real_distribution<double>(-0.2, 1.2)(random);  // often none of it, or all
  std::bernoulli_distribution keep(std::min(1.0, std::max(0.0, kept)));
  for (auto write = faults.unsynced.rbegin(); write != faults.unsynced.rend(); ++write) {
    AlignedBuffer page(kPageNbytes);
    for (std::size_t at = 0; at < write->before.size(); at += kPageNbytes) {
      if (keep(random)) continue;
      const std::size_t nbytes = std::min(kPageNbytes, write->before.size() - at);
      std::memcpy(page.address(), write->before.data() + at, nbytes);
      if (::pwrite(write->descriptor, page.address(), nbytes, static_cast<off_t>(write->offset + at)) < 0) break;
    }
  }
  ::_exit(kPowerLossStatus);
}

bool Backend::over_quota(const Piece& piece) const {
  Faults& faults = *options_.faults;
  std::lock_guard<std::mutex> lock(faults.mutex);
  for (std::uint64_t at = piece.offset; at < piece.offset + piece.nbytes; at += kPageNbytes)
    faults.pages.insert({options_.descriptor, at / kPageNbytes});
  return faults.pages.size() > faults.quota_pages;
}

void Backend::wait_for_rate(std::int64_t nbytes) const {
  using std::chrono::steady_clock;
  Faults& faults = *options_.faults;
  const std::chrono::duration<double> takes(static_cast<double>(nbytes) / faults.bytes_per_s);
  std::unique_lock<std::mutex> lock(faults.mutex);
  faults.idle_from =
      std::max(faults.idle_from, steady_clock::now()) + std::chrono::duration_cast<steady_clock::duration>(takes);
  const auto until = faults.idle_from;
  lock.unlock();
  std::this_thread::sleep_until(until);
}

std::int64_t Backend::injected(const Piece& piece, std::int64_t result) const {
  const auto& faults = options_.faults;
  const bool is_read = piece.op == Op::read;
  maybe_lose_power();
  if (faults->power_loss_nth != 0) {
    // Once power is lost its loser keeps the lock: no transfer comes back, and nobody reads what it is undoing.
    const std::lock_guard<std::mutex> until_the_end(faults->mutex);
  }
  if (!is_read && faults->quota_pages != 0 && over_quota(piece)) return -ENOSPC;
  if (!(is_read ? faults->reads : faults->writes)) return result;
  const std::uint64_t nth = faults->seen.fetch_add(1) + 1;
  if (faults->delay_ms != 0) std::this_thread::sleep_for(std::chrono::milliseconds(faults->delay_ms));
  if (faults->bytes_per_s > 0 && result > 0) wait_for_rate(result);
  const std::int64_t true_result = result;
  if (faults->fail_nth != 0 && nth >= faults->fail_nth && nth - faults->fail_nth < faults->fail_count)
    result = -faults->error;
  if (faults->short_every != 0 && nth % faults->short_every == 0)
    result = std::min(result, static_cast<std::int64_t>(faults->short_nbytes));
  if (result == true_result) return result;
  const std::size_t alignment = piece.file ? piece.file->alignment : kPageNbytes;
  const std::size_t moved = result < 0 ? 0 : static_cast<std::size_t>(result) / alignment * alignment;
  if (true_result <= 0) return result;
  if (is_read) {
    std::memset(piece.address + moved, 0xFF, piece.nbytes - moved);
  } else {
    const AlignedBuffer spoilt(piece.nbytes - moved);
    std::memset(spoilt.address(), 0xFF, spoilt.nbytes());
    if (::pwrite(descriptor_of(piece), spoilt.address(), piece.nbytes - moved,
                 static_cast<off_t>(piece.offset + moved)) < 0)
      return -errno;
  }
  return result;
}

std::size_t Backend::alignment_of(const Piece& piece) const {
  if (piece.file) return piece.file->alignment;
  return options_.direct ? kPageNbytes : 1;
}

bool Backend::settle(Piece& piece, std::int64_t result) {
  const bool is_read = piece.op == Op::read;
  if (options_.faults) result = injected(piece, result);
  if (result == -EINTR || result == -EAGAIN) {
    if (++piece.attempts <= kAttemptsMax) return true;
    fail(piece, static_cast<int>(-result), "still interrupted after " + std::to_string(kAttemptsMax) + " attempts");
    return false;
  }
  if (result < 0) {
    fail(piece, static_cast<int>(-result), "failed");
    return false;
  }
  std::size_t moved = static_cast<std::size_t>(result);
  if (moved == 0) {
    fail(piece, is_read ? EIO : ENOSPC, is_read ? "the file ends here; it was truncated" : "nothing was written");
    return false;
  }
  const std::size_t alignment = alignment_of(piece);
  if (moved < piece.nbytes && alignment > 1) {
    moved = moved / alignment * alignment;  // a resumed O_DIRECT transfer starts on a page again
    if (moved == 0 && ++piece.attempts > kAttemptsMax) {
      fail(piece, EIO, "less than a page moved, again and again");
      return false;
    }
  }
  (is_read ? counters_.read_nbytes : counters_.written_nbytes).fetch_add(moved, std::memory_order_relaxed);
  (is_read ? counters_.read_ops : counters_.write_ops).fetch_add(1, std::memory_order_relaxed);
  if (moved == piece.nbytes) {
    end(piece, {});
    return false;
  }
  piece.address += moved;
  piece.offset += moved;
  piece.nbytes -= moved;
  return true;
}

}  // namespace offload::io
