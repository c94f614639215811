// Threads are not inherited by a forked process: what it asks of them would never be done.
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <string>
#include <system_error>

namespace offload {

// As getpid, without a call of the system: requests ask every time.
inline int process_id() {
  static std::atomic<int> id{::getpid()};
  static const bool followed = ::pthread_atfork(nullptr, nullptr, [] { id = ::getpid(); }) == 0;
  return followed ? id.load(std::memory_order_relaxed) : ::getpid();
}

// Throws std::system_error in any process but the owner.
inline void refuse_forked(int owner_pid) {
  if (process_id() == owner_pid) return;
  throw std::system_error(ECHILD, std::generic_category(),
                          "process " + std::to_string(owner_pid) +
                              ", which this one was forked from, has the threads that would do this: make one of this "
                              "process's own");
}

}  // namespace offload
