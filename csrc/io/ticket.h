// A ticket is one asynchronous request: it completes exactly once, with success or with the first error.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace offload::io {

struct Error {
  int code = 0;  // errno, 0 for success
  std::string message;
};

class Ticket {
 public:
  using Callback = std::function<void(const Error&)>;
  using Clock = std::chrono::steady_clock;

  explicit Ticket(std::size_t pieces) : pending_(pieces), begun_(Clock::now()) {}

  // One piece has ended; the ticket completes with the last of them. Callbacks run here, outside the lock.
  void settle_piece(const Error& error) {
    std::vector<Callback> callbacks;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (error.code != 0 && error_.code == 0) error_ = error;
      if (--pending_ != 0) return;
      ended_ = Clock::now();
      callbacks.swap(callbacks_);
      // Notified under the lock: a waiter may drop the last reference as soon as it is released.
      changed_.notify_all();
    }
    for (const Callback& callback : callbacks) callback(error_);
  }

  // Runs `callback` once on completion, at once when already complete. It must be short.
  void on_complete(Callback callback) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (pending_ != 0) {
        callbacks_.push_back(std::move(callback));
        return;
      }
    }
    callback(error_);
  }

  bool done() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return pending_ == 0;
  }

  // True when complete within `timeout`.
  bool wait_for(std::chrono::milliseconds timeout) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, timeout, [this] { return pending_ == 0; });
  }

  // When it was made, and when it completed. Only meaningful once complete.
  std::pair<Clock::time_point, Clock::time_point> times() const { return {begun_, ended_}; }
  // Only meaningful once complete.
  const Error& error() const { return error_; }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::size_t pending_;
  Error error_;
  Clock::time_point begun_, ended_;
  std::vector<Callback> callbacks_;
};

}  // namespace offload::io
