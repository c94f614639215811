// Checks that survive release builds and have no side effects.
#pragma once

#include <stdexcept>
#include <string>

#define OFFLOAD_CHECK(condition, message)                                \
  do {                                                                   \
    if (!(condition)) throw std::invalid_argument(std::string(message)); \
  } while (false)
