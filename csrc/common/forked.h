// Threads are not inherited by a forked process: what it asks of them would never be done.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace offload {

// Throws std::system_error in any process but the owner.
inline void refuse_forked(int owner_pid) {
  if (::getpid() == owner_pid) return;
  throw std::system_error(ECHILD, std::generic_category(),
                          "process " + std::to_string(owner_pid) +
                              ", which this one was forked from, has the threads that would do this: make one of this "
                              "process's own");
}

}  // namespace offload
