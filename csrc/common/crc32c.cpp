#include "common/crc32c.h"

#include <array>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace offload {

namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78u;  // Castagnoli's, bits reversed
constexpr std::size_t kLane = 1024;                 // bytes of one of three interleaved streams

// Polynomials modulo Castagnoli's, bits reversed: the highest bit is the factor of x^0.
constexpr std::uint32_t kOne = 0x80000000u;

std::uint32_t times_x(std::uint32_t a) { return (a >> 1) ^ ((a & 1u) != 0 ? kPolynomial : 0u); }

std::uint32_t product(std::uint32_t a, std::uint32_t b) {
  std::uint32_t sum = 0;
  for (; a != 0; a <<= 1, b = times_x(b))
    if ((a & kOne) != 0) sum ^= b;
  return sum;
}

// x^n.
std::uint32_t power_of_x(std::size_t n) {
  static const std::array<std::uint32_t, 64> squares = [] {  // x^(2^k)
    std::array<std::uint32_t, 64> made{};
    made[0] = times_x(kOne);
    for (std::size_t k = 1; k < made.size(); ++k) made[k] = product(made[k - 1], made[k - 1]);
    return made;
  }();
  std::uint32_t power = kOne;
  for (std::size_t k = 0; n != 0; ++k, n >>= 1)
    if ((n & 1u) != 0) power = product(squares[k], power);
  return power;
}

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
    std::array<std::uint32_t, 32> of_bit{};
    for (std::size_t bit = 0; bit < 32; ++bit) of_bit[bit] = product(power_of_x(8 * kLane), std::uint32_t{1} << bit);
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

constexpr std::size_t kFolded = 256;  // bytes of the four registers that are folded at once

// What moves 16 bytes on by so many: the factor of their first 8 bytes, and of their last. A product of two reversed
// polynomials is one bit short.
struct FoldFactors {
  explicit FoldFactors(std::size_t nbytes)
      : first(std::uint64_t{power_of_x(8 * nbytes + 32)} << 1), last(std::uint64_t{power_of_x(8 * nbytes - 32)} << 1) {}
  std::uint64_t first, last;
};

__attribute__((target("avx512f"))) inline __m512i broadcast(const FoldFactors& factors) {
  const auto first = static_cast<long long>(factors.first), last = static_cast<long long>(factors.last);
  return _mm512_set_epi64(last, first, last, first, last, first, last, first);
}

__attribute__((target("avx512f,vpclmulqdq"))) inline __m512i folded(__m512i bytes, __m512i factors, __m512i onto) {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(bytes, factors, 0x00),
                                   _mm512_clmulepi64_epi128(bytes, factors, 0x11), onto, kXorOfThree);
}

// Bytes far ahead are folded onto later ones by carry-less products, which leaves the remainder as it is (Gopal et al.,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009); the last 64 are left to the instruction.
__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) std::uint32_t update_by_products(std::uint32_t state,
                                                                                      const unsigned char* at,
                                                                                      std::size_t nbytes) {
  if (nbytes < 2 * kFolded) return update_by_instruction(state, at, nbytes);
  static const FoldFactors on_by_256(kFolded), on_by_64(64);
  const __m512i by_256 = broadcast(on_by_256), by_64 = broadcast(on_by_64);
  __m512i sums[4];
  for (std::size_t i = 0; i < 4; ++i) sums[i] = _mm512_loadu_si512(at + 64 * i);
  sums[0] = _mm512_xor_si512(sums[0], _mm512_maskz_set1_epi32(1, static_cast<int>(state)));
  for (at += kFolded, nbytes -= kFolded; nbytes >= kFolded; at += kFolded, nbytes -= kFolded)
    for (std::size_t i = 0; i < 4; ++i) sums[i] = folded(sums[i], by_256, _mm512_loadu_si512(at + 64 * i));
  for (std::size_t i = 0; i < 3; ++i) sums[i + 1] = folded(sums[i], by_64, sums[i + 1]);
  std::array<unsigned char, 64> rest{};
  _mm512_storeu_si512(rest.data(), sums[3]);
  return update_by_instruction(update_by_instruction(0, rest.data(), rest.size()), at, nbytes);
}

#endif

}  // namespace

const std::vector<Crc32cLevel>& crc32c_levels() {
  static const std::vector<Crc32cLevel> available = [] {
    std::vector<Crc32cLevel> list{{"table", &update_by_table}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
    if (has_instruction) list.push_back({"sse4.2", &update_by_instruction});
    if (has_instruction && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"))
      list.push_back({"vpclmulqdq", &update_by_products});
#endif
    return list;
  }();
  return available;
}

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc) {
  static const auto update = crc32c_levels().back().update;
  return ~update(~crc, static_cast<const unsigned char*>(data), nbytes);
}

std::uint32_t crc32c_at(const std::string& level, const void* data, std::size_t nbytes, std::uint32_t crc) {
  for (const Crc32cLevel& entry : crc32c_levels())
    if (entry.name == level) return ~entry.update(~crc, static_cast<const unsigned char*>(data), nbytes);
  throw std::invalid_argument("a CRC32C by " + level + " is not available here");
}

std::uint32_t crc32c_join(std::uint32_t first, std::uint32_t second, std::size_t second_nbytes) {
  return product(power_of_x(8 * second_nbytes), first) ^ second;
}

}  // namespace offload
