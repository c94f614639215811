// io_uring through liburing: one ring and one thread per file. The only file that includes liburing.
#include "io/backend.h"

#ifdef OFFLOAD_HAVE_URING

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <thread>

namespace offload::io {

namespace {

constexpr std::uint64_t kWake = ~std::uint64_t{0};
constexpr unsigned kRegisteredMax = 256;
constexpr unsigned kBusyRetriesMax = 1000;                            // a millisecond apart
constexpr std::size_t kRegisteredPieceNbytes = std::size_t{1} << 30;  // the kernel's limit for one registered buffer
constexpr unsigned kCompletionBatchMax = 4;

// The cheapest completions first: run by the one thread that owns the ring, when it asks for them (Linux 6.1).
constexpr unsigned kSetups[] = {
#if defined(IORING_SETUP_DEFER_TASKRUN) && defined(IORING_SETUP_SINGLE_ISSUER)
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
#endif
#ifdef IORING_SETUP_COOP_TASKRUN
    IORING_SETUP_COOP_TASKRUN,
#endif
    0,
};

// Makes room for buffers: empty ones, which Linux takes from 5.13 on, where flags that say so are of 5.19.
int register_room([[maybe_unused]] io_uring* ring) {
#ifdef IORING_FEAT_RSRC_TAGS  // liburing 2.1
  const std::vector<iovec> none(kRegisteredMax, iovec{});
  const std::vector<__u64> tags(kRegisteredMax);
  return io_uring_register_buffers_tags(ring, none.data(), tags.data(), kRegisteredMax);
#else
  return -EOPNOTSUPP;
#endif
}

int register_at([[maybe_unused]] io_uring* ring, [[maybe_unused]] std::size_t index,
                [[maybe_unused]] const iovec& buffer) {
#ifdef IORING_FEAT_RSRC_TAGS
  const __u64 tag = 0;
  return io_uring_register_buffers_update_tag(ring, static_cast<unsigned>(index), &buffer, &tag, 1);
#else
  return -EOPNOTSUPP;
#endif
}

struct Registered {
  char* address = nullptr;
  std::size_t nbytes = 0;
};

// A buffer to register: the kernel takes it from the ring's own thread only.
struct Registration {
  Registered buffer;
  std::promise<bool> done;
};

// [Note: one thread owns the ring] It sets the ring up, registers, submits and reaps; others hand it work through the
// queues under `mutex_` and wake it through an eventfd that the ring reads.
class UringBackend final : public Backend {
 public:
  UringBackend(const BackendOptions& options, std::string& reason) : Backend(options) {
    wake_descriptor_ = ::eventfd(0, EFD_CLOEXEC);
    if (wake_descriptor_ < 0) {
      reason = std::string("eventfd: ") + std::strerror(errno);
      return;
    }
    in_flight_.resize(options.queue_depth);
    for (unsigned i = options.queue_depth; i-- > 0;) free_.push_back(i);
    const auto set_up = std::make_shared<std::promise<int>>();
    try {
      thread_ = std::thread([this, set_up] {
        const int result = set_up_ring();
        set_up->set_value(result);
        if (result == 0) run();
      });
    } catch (...) {  // the system has no room for a thread: nobody else closes it
      ::close(wake_descriptor_);
      throw;
    }
    const int result = set_up->get_future().get();
    usable_ = result == 0;
    if (usable_) return;
    thread_.join();
    reason = result == -EOPNOTSUPP ? "the kernel's io_uring cannot read and write files: it needs Linux 5.6"
                                   : std::string("io_uring_setup: ") + std::strerror(-result);
  }

  ~UringBackend() override {
    close();
    if (wake_descriptor_ >= 0) ::close(wake_descriptor_);
  }

  bool usable() const { return usable_; }

  void submit(std::vector<Piece> pieces) override {
    bool wake = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!closing_) {
        wake = urgent_.empty() && normal_.empty();
        for (Piece& piece : pieces) (piece.urgent ? urgent_ : normal_).push_back(std::move(piece));
        pieces.clear();
      }
    }
    if (wake) wake_thread();
    for (Piece& piece : pieces) fail(piece, ECANCELED, "the engine is closed");
  }

  bool register_buffer(char* address, std::size_t nbytes) override {
    const auto registration = std::make_shared<Registration>();
    registration->buffer = {address, nbytes};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closing_) return false;
      registrations_.push_back(registration);
    }
    wake_thread();
    return registration->done.get_future().get();
  }

  void cancel() override {
    std::deque<Piece> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      take_queued(dropped);
    }
    wake_thread();
    for (Piece& piece : dropped) fail(piece, ECANCELED, "cancelled");
  }

  void close() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    std::lock_guard<std::mutex> lock(close_mutex_);
    if (thread_.joinable()) {
      wake_thread();
      thread_.join();
    }
    // The ring goes now, not with the object: it pins every registered buffer.
    if (usable_) io_uring_queue_exit(&ring_);
    usable_ = false;
  }

 private:
  // Older kernels have rings, but not the operations.
  bool moves_files() {
    io_uring_probe* const probe = io_uring_get_probe_ring(&ring_);
    const bool moves = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0 &&
                       io_uring_opcode_supported(probe, IORING_OP_WRITE) != 0;
    io_uring_free_probe(probe);
    return moves;
  }

  // Called with the lock.
  void take_queued(std::deque<Piece>& into) {
    for (std::deque<Piece>* queue : {&urgent_, &normal_}) {
      for (Piece& piece : *queue) into.push_back(std::move(piece));
      queue->clear();
    }
  }

  int set_up_ring() {
    int result = -EINVAL;
    for (const unsigned setup : kSetups) {
      result = io_uring_queue_init(options_.queue_depth + 2, &ring_, setup);
      if (result != -EINVAL) break;
    }
    if (result < 0) return result;
    if (!moves_files()) {
      io_uring_queue_exit(&ring_);
      return -EOPNOTSUPP;
    }
    file_registered_ = options_.descriptor >= 0 && io_uring_register_files(&ring_, &options_.descriptor, 1) == 0;
    has_room_ = register_room(&ring_) == 0;
    return 0;
  }

  void wake_thread() const {
    const std::uint64_t one = 1;
    while (::write(wake_descriptor_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  bool register_with_kernel(const Registered& buffer) {
    if (!has_room_) return false;
    for (std::size_t start = 0; start < buffer.nbytes; start += kRegisteredPieceNbytes) {
      const std::size_t piece_nbytes = std::min(kRegisteredPieceNbytes, buffer.nbytes - start);
      if (registered_.size() == kRegisteredMax) return false;
      const iovec piece{buffer.address + start, piece_nbytes};
      if (register_at(&ring_, registered_.size(), piece) < 0) return false;
      registered_.push_back({buffer.address + start, piece_nbytes});
    }
    return true;
  }

  int registered_index(const char* address, std::size_t nbytes) const {
    for (std::size_t i = 0; i < registered_.size(); ++i)
      if (address >= registered_[i].address && address + nbytes <= registered_[i].address + registered_[i].nbytes)
        return static_cast<int>(i);
    return -1;
  }

  void prepare(unsigned slot) {
    const Piece& piece = in_flight_[slot];
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    const auto nbytes = static_cast<unsigned>(piece.nbytes);
    const int buffer = registered_index(piece.address, nbytes);
    const bool registered = file_registered_ && !piece.file;
    const int file = registered ? 0 : descriptor_of(piece);
    if (piece.op == Op::read) {
      if (buffer >= 0)
        io_uring_prep_read_fixed(sqe, file, piece.address, nbytes, piece.offset, buffer);
      else
        io_uring_prep_read(sqe, file, piece.address, nbytes, piece.offset);
    } else {
      if (buffer >= 0)
        io_uring_prep_write_fixed(sqe, file, piece.address, nbytes, piece.offset, buffer);
      else
        io_uring_prep_write(sqe, file, piece.address, nbytes, piece.offset);
    }
    if (registered) sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = slot;  // after prep, which clears it
  }

  // Registers what waits for it and moves queued pieces into free slots, urgent ones first. False when nothing is left
  // and the backend closes.
  bool fill() {
    filled_.clear();
    std::vector<std::shared_ptr<Registration>> registrations;
    bool finished = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      registrations.swap(registrations_);
      while (!free_.empty() && (!urgent_.empty() || !normal_.empty())) {
        std::deque<Piece>& queue = urgent_.empty() ? normal_ : urgent_;
        const unsigned slot = free_.back();
        free_.pop_back();
        in_flight_[slot] = std::move(queue.front());
        queue.pop_front();
        filled_.push_back(slot);
      }
      finished = closing_ && free_.size() == in_flight_.size();
    }
    count_in_flight(in_flight_.size() - free_.size());
    for (const auto& registration : registrations)
      registration->done.set_value(register_with_kernel(registration->buffer));
    for (const unsigned slot : filled_) prepare(slot);
    return !finished;
  }

  // While every slot is taken nothing new can start, so a few completions are worth one wake.
  unsigned completions_wanted() const {
    if (!free_.empty()) return 1;
    return std::clamp(static_cast<unsigned>(in_flight_.size()) / 8, 1u, kCompletionBatchMax);
  }

  void run() {
    loop();
    // The ring's end would do so too, but some time after it: until then the memory stays locked.
    if (!registered_.empty() && free_.size() == in_flight_.size()) io_uring_unregister_buffers(&ring_);
  }

  void loop() {
    bool wake_armed = false;
    unsigned busy_retries = 0;
    std::vector<std::pair<std::uint64_t, int>> completions;
    while (fill()) {
      if (!wake_armed) {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
        io_uring_prep_read(sqe, wake_descriptor_, &wake_value_, sizeof wake_value_, 0);
        sqe->user_data = kWake;
        wake_armed = true;
      }
      const int submitted = io_uring_submit_and_wait(&ring_, completions_wanted());
      if (submitted > 0) counters_.submit_calls.fetch_add(1, std::memory_order_relaxed);
      if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY) {
        abandon(-submitted);
        return;
      }
      if (submitted == -EAGAIN || submitted == -EBUSY) {
        if (++busy_retries > kBusyRetriesMax) {
          abandon(-submitted);
          return;
        }
        ::usleep(1000);
      } else {
        busy_retries = 0;
      }
      // Drain first, decide later.
      completions.clear();
      unsigned head = 0;
      unsigned n_seen = 0;
      io_uring_cqe* cqe = nullptr;
      io_uring_for_each_cqe(&ring_, head, cqe) {
        completions.emplace_back(cqe->user_data, cqe->res);
        ++n_seen;
      }
      io_uring_cq_advance(&ring_, n_seen);
      for (const auto& [data, result] : completions) {
        if (data == kWake) {
          wake_armed = false;
          continue;
        }
        const auto slot = static_cast<unsigned>(data);
        if (settle(in_flight_[slot], result)) {
          prepare(slot);
        } else {
          in_flight_[slot].ticket.reset();
          free_.push_back(slot);
        }
      }
    }
  }

  // The ring itself is broken: nobody may be left waiting.
  void abandon(int code) {
    std::deque<Piece> rest;
    std::vector<std::shared_ptr<Registration>> registrations;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      registrations.swap(registrations_);
      take_queued(rest);
    }
    for (Piece& piece : in_flight_)
      if (piece.ticket) fail(piece, code, "io_uring_enter failed");
    for (Piece& piece : rest) fail(piece, code, "io_uring_enter failed");
    for (const auto& registration : registrations) registration->done.set_value(false);
  }

  io_uring ring_{};
  bool usable_ = false;  // guarded by close_mutex_ once constructed
  int wake_descriptor_ = -1;
  std::uint64_t wake_value_ = 0;  // the kernel writes here, also after the loop has ended
  std::mutex close_mutex_;
  std::mutex mutex_;  // guards the queues and closing_
  std::deque<Piece> urgent_, normal_;
  std::vector<std::shared_ptr<Registration>> registrations_;
  bool closing_ = false;
  // The I/O thread's own:
  bool file_registered_ = false, has_room_ = false;
  std::vector<Piece> in_flight_;
  std::vector<unsigned> free_, filled_;
  std::vector<Registered> registered_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Backend> make_uring_backend(const BackendOptions& options, std::string& reason) {
  auto backend = std::make_unique<UringBackend>(options, reason);
  if (!backend->usable()) return nullptr;
  return backend;
}

}  // namespace offload::io

#else

namespace offload::io {

std::unique_ptr<Backend> make_uring_backend(const BackendOptions&, std::string& reason) {
  reason = "built without liburing: install liburing-dev and build again";
  return nullptr;
}

}  // namespace offload::io

#endif
