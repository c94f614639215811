// pread/pwrite on a few threads, for where io_uring is not allowed.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "io/backend.h"

namespace offload::io {

namespace {

class PosixBackend final : public Backend {
 public:
  explicit PosixBackend(const BackendOptions& options) : Backend(options) {
    const unsigned n_threads = options.queue_depth < 4 ? options.queue_depth : 4;
    try {
      for (unsigned i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {  // the system has no room for more threads: those there are must end before their object does
      close();
      throw;
    }
  }
  ~PosixBackend() override { close(); }

  void submit(std::vector<Piece> pieces) override {
    const bool is_one = pieces.size() == 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!closing_) {
        for (Piece& piece : pieces) (piece.urgent ? urgent_ : normal_).push_back(std::move(piece));
        pieces.clear();
      }
    }
    if (is_one)
      changed_.notify_one();  // the other threads would find nothing
    else
      changed_.notify_all();
    for (Piece& piece : pieces) fail(piece, ECANCELED, "the engine is closed");
  }

  bool register_buffer(char*, std::size_t) override { return false; }

  void cancel() override {
    std::deque<Piece> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      for (std::deque<Piece>* queue : {&urgent_, &normal_}) {
        for (Piece& piece : *queue) dropped.push_back(std::move(piece));
        queue->clear();
      }
    }
    changed_.notify_all();
    for (Piece& piece : dropped) fail(piece, ECANCELED, "cancelled");
  }

  void close() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return closing_ || !urgent_.empty() || !normal_.empty(); });
      std::deque<Piece>& queue = urgent_.empty() ? normal_ : urgent_;
      if (queue.empty()) return;
      Piece piece = std::move(queue.front());
      queue.pop_front();
      count_in_flight(++in_flight_);
      lock.unlock();
      while (settle(piece, transfer(piece))) {
      }
      piece.ticket.reset();
      lock.lock();
      --in_flight_;
    }
  }

  std::int64_t transfer(const Piece& piece) {
    counters_.submit_calls.fetch_add(1, std::memory_order_relaxed);
    const auto offset = static_cast<off_t>(piece.offset);
    const ssize_t result = piece.op == Op::read ? ::pread(descriptor_of(piece), piece.address, piece.nbytes, offset)
                                                : ::pwrite(descriptor_of(piece), piece.address, piece.nbytes, offset);
    return result < 0 ? -errno : result;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> urgent_, normal_;
  bool closing_ = false;
  std::uint64_t in_flight_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Backend> make_posix_backend(const BackendOptions& options) {
  return std::make_unique<PosixBackend>(options);
}

}  // namespace offload::io
