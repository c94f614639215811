// CRC32C (Castagnoli, RFC 3720): the checksum of every chunk the library stores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// Checksum of `nbytes` bytes that follow bytes whose checksum is `crc` (0: none). With the processor's instruction where
// it has one, else with tables.
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc = 0);
// The same by tables alone.
std::uint32_t crc32c_by_table(const void* data, std::size_t nbytes, std::uint32_t crc = 0);
// "sse4.2" or "table": what crc32c uses here.
const char* crc32c_kind();

}  // namespace offload
