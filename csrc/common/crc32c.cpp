#include "common/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace offload {

namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78u;  // Castagnoli's, bits reversed
constexpr std::size_t kLane = 1024;                 // bytes of one of three interleaved streams

using Table = std::array<std::array<std::uint32_t, 256>, 8>;

// Row k: the effect of a byte that is followed by k more bytes.
const Table& byte_tables() {
  static const Table tables = [] {
    Table made{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      std::uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1u) != 0 ? kPolynomial : 0u);
      made[0][byte] = value;
    }
    for (std::size_t row = 1; row < 8; ++row)
      for (std::size_t byte = 0; byte < 256; ++byte)
        made[row][byte] = (made[row - 1][byte] >> 8) ^ made[0][made[row - 1][byte] & 0xFFu];
    return made;
  }();
  return tables;
}

std::uint32_t update_by_table(std::uint32_t state, const unsigned char* at, std::size_t nbytes) {
  const Table& tables = byte_tables();
  for (; nbytes >= 8; at += 8, nbytes -= 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, at, 8);
    word ^= state;
    state = 0;
    for (std::size_t i = 0; i < 8; ++i) state ^= tables[7 - i][(word >> (8 * i)) & 0xFFu];
  }
  for (; nbytes > 0; ++at, --nbytes) state = (state >> 8) ^ tables[0][(state ^ *at) & 0xFFu];
  return state;
}

#if defined(__x86_64__)

using ShiftTable = std::array<std::array<std::uint32_t, 256>, 4>;

// What kLane zero bytes make of a state: linear over its bits, so one table of 256 for each of its four bytes.
const ShiftTable& lane_shift() {
  static const ShiftTable table = [] {
    const std::array<unsigned char, kLane> zeros{};
    std::array<std::uint32_t, 32> of_bit{};
    for (std::size_t bit = 0; bit < 32; ++bit)
      of_bit[bit] = update_by_table(std::uint32_t{1} << bit, zeros.data(), zeros.size());
    ShiftTable made{};
    for (std::size_t row = 0; row < 4; ++row)
      for (std::size_t byte = 0; byte < 256; ++byte)
        for (std::size_t bit = 0; bit < 8; ++bit)
          if ((byte >> bit & 1u) != 0) made[row][byte] ^= of_bit[8 * row + bit];
    return made;
  }();
  return table;
}

std::uint32_t shifted(const ShiftTable& table, std::uint32_t state) {
  return table[0][state & 0xFFu] ^ table[1][state >> 8 & 0xFFu] ^ table[2][state >> 16 & 0xFFu] ^ table[3][state >> 24];
}

// The instruction has a latency of three cycles: three streams keep it busy, and are joined by shifting.
__attribute__((target("sse4.2"))) std::uint32_t update_by_instruction(std::uint32_t start, const unsigned char* at,
                                                                      std::size_t nbytes) {
  const auto word = [](const unsigned char* from) {
    std::uint64_t value = 0;
    std::memcpy(&value, from, 8);
    return value;
  };
  std::uint64_t state = start;
  const ShiftTable& table = lane_shift();
  for (; nbytes >= 3 * kLane; at += 3 * kLane, nbytes -= 3 * kLane) {
    std::uint64_t second = 0, third = 0;
    for (std::size_t i = 0; i < kLane; i += 8) {
      state = _mm_crc32_u64(state, word(at + i));
      second = _mm_crc32_u64(second, word(at + kLane + i));
      third = _mm_crc32_u64(third, word(at + 2 * kLane + i));
    }
    const auto two = shifted(table, static_cast<std::uint32_t>(state)) ^ static_cast<std::uint32_t>(second);
    state = shifted(table, two) ^ static_cast<std::uint32_t>(third);
  }
  for (; nbytes >= 8; at += 8, nbytes -= 8) state = _mm_crc32_u64(state, word(at));
  auto rest = static_cast<std::uint32_t>(state);
  for (; nbytes > 0; ++at, --nbytes) rest = _mm_crc32_u8(rest, *at);
  return rest;
}

bool has_instruction() {
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2") != 0;
  }();
  return has;
}

#endif

}  // namespace

std::uint32_t crc32c_by_table(const void* data, std::size_t nbytes, std::uint32_t crc) {
  return ~update_by_table(~crc, static_cast<const unsigned char*>(data), nbytes);
}

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc) {
#if defined(__x86_64__)
  if (has_instruction()) return ~update_by_instruction(~crc, static_cast<const unsigned char*>(data), nbytes);
#endif
  return crc32c_by_table(data, nbytes, crc);
}

const char* crc32c_kind() {
#if defined(__x86_64__)
  if (has_instruction()) return "sse4.2";
#endif
  return "table";
}

}  // namespace offload
