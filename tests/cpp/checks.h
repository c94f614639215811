// What every C++ test program counts and waits with.
#pragma once

#include <chrono>
#include <cstdio>
#include <memory>

#include "io/ticket.h"

inline int failures = 0;

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

// Whether the ticket was done within a minute.
inline bool wait(const std::shared_ptr<offload::io::Ticket>& ticket) {
  for (int i = 0; i < 600; ++i)
    if (ticket->wait_for(std::chrono::milliseconds(100))) return true;
  return false;
}
