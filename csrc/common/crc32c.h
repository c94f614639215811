// CRC32C (Castagnoli, RFC 3720): the checksum of every chunk the library stores.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace offload {

// One way to compute it: "table", "sse4.2" (the processor's instruction), "vpclmulqdq" (carry-less products of 64
// bytes).
struct Crc32cLevel {
  std::string name;
  std::uint32_t (*update)(std::uint32_t state, const unsigned char* at, std::size_t nbytes);
};

// What this processor and operating system can run; "table" first, the fastest last.
const std::vector<Crc32cLevel>& crc32c_levels();

// Checksum of `nbytes` bytes that follow bytes whose checksum is `crc` (0: none), as fast as it goes here.
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc = 0);
// The same at one level. Throws std::invalid_argument for one that is not available.
std::uint32_t crc32c_at(const std::string& level, const void* data, std::size_t nbytes, std::uint32_t crc = 0);

// Checksum of the bytes of `first` followed by the `second_nbytes` bytes of `second`.
std::uint32_t crc32c_join(std::uint32_t first, std::uint32_t second, std::size_t second_nbytes);

}  // namespace offload
