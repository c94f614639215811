// What a chunk's record of optimizer state is made of, and how many bytes it takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/aligned_buffer.h"

namespace offload::optim {

enum class Codec { split_bf16, fp32 };

// int8, uint8: codes of the signed or unsigned dynamic map (quant_map.h) and an fp32 absmax a block of kQuantBlock.
enum class PlaneKind { float32, bfloat16, int8, uint8 };
using StatePlanes = std::vector<PlaneKind>;

constexpr std::size_t kQuantBlock = 256;
constexpr std::size_t kStatePlanesMax = 8;

inline bool is_quantised(PlaneKind kind) { return kind == PlaneKind::int8 || kind == PlaneKind::uint8; }

inline std::size_t code_nbytes(PlaneKind kind) {
  if (kind == PlaneKind::float32) return 4;
  return kind == PlaneKind::bfloat16 ? 2 : 1;
}

// Codes of n elements, and behind them the absmax of their blocks.
inline std::size_t plane_nbytes(PlaneKind kind, std::size_t n) {
  return n * code_nbytes(kind) + (is_quantised(kind) ? (n + kQuantBlock - 1) / kQuantBlock * sizeof(float) : 0);
}

inline std::size_t lo_nbytes(Codec codec, std::size_t n) { return codec == Codec::split_bf16 ? 2 * n : 0; }

// lo (split_bf16 only) and the state planes end to end, in whole pages.
inline std::size_t record_nbytes(Codec codec, const StatePlanes& planes, std::size_t n) {
  std::size_t nbytes = lo_nbytes(codec, n);
  for (const PlaneKind kind : planes) nbytes += plane_nbytes(kind, n);
  return (nbytes + kPageNbytes - 1) / kPageNbytes * kPageNbytes;
}

}  // namespace offload::optim
