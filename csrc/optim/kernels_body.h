// What every rule shares, written once. Included inside one namespace per instruction set, with OFFLOAD_TARGET set to
// the function attributes of that set; there is no include guard on purpose. No fused multiply-add anywhere
// (-ffp-contract=off), so every instruction set gives the same bits; but where 8-bit moments are codes on lines, whose
// every value and code a test compares (moments_vectors_body.h).
//
// A rule is a loop over fp32 moments (rules_body.h). Moments of another kind are decoded to fp32, updated and encoded
// again, kQuantBlock elements at a time in the first-level cache (moments_body.h): the rule does not know.

OFFLOAD_TARGET inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

OFFLOAD_TARGET inline float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// hi: nearest bf16, ties away from zero; lo: what is missing, modulo 2^16. A bijection on all 2^32 patterns.
OFFLOAD_TARGET inline std::uint16_t hi_of(std::uint32_t bits) {
  return static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
}
OFFLOAD_TARGET inline std::int16_t lo_of(std::uint32_t bits) { return static_cast<std::int16_t>(bits & 0xFFFFu); }
OFFLOAD_TARGET inline std::uint32_t merged(std::uint16_t hi, std::int16_t lo) {
  return (static_cast<std::uint32_t>(hi) << 16) + static_cast<std::uint32_t>(static_cast<std::int32_t>(lo));
}
// Every NaN becomes 0x7FC00000, whose hi is a NaN too. Which payload and sign a NaN carries depends on operand order
// and processor, so all results go through here.
OFFLOAD_TARGET inline std::uint32_t canonical(std::uint32_t bits) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  return (bits & ~mask) | (0x7FC00000u & mask);  // no branch, which would keep the loop from being vectorised
}

template <typename Param>
OFFLOAD_TARGET inline float load_master(const Param* param, const std::int16_t* lo, std::size_t i) {
  if constexpr (sizeof(Param) == 2)
    return float_of(merged(param[i], lo[i]));
  else
    return param[i];
}

template <typename Param>
OFFLOAD_TARGET inline void store_master(Param* param, std::int16_t* lo, std::size_t i, float value) {
  const std::uint32_t bits = canonical(bits_of(value));
  if constexpr (sizeof(Param) == 2) {
    param[i] = hi_of(bits);
    lo[i] = lo_of(bits);
  } else {
    param[i] = float_of(bits);
  }
}

template <typename Grad>
OFFLOAD_TARGET inline float load_grad(const Grad* grad, std::size_t i, float scale) {
  if constexpr (sizeof(Grad) == 2)
    return float_of(static_cast<std::uint32_t>(grad[i]) << 16) * scale;
  else
    return grad[i] * scale;
}

#include "optim/rules_body.h"
//
#include "optim/moments_body.h"

// One tile after the other: decode, update, encode.
OFFLOAD_TARGET void update_tiles(RuleLoop loop, std::size_t param_nbytes, std::size_t grad_nbytes,
                                 const StatePlanes& kinds, const Planes& planes, std::size_t n, const Scalars& s) {
  alignas(64) float moments[kMomentsMax][kQuantBlock];
  for (std::size_t start = 0; start < n; start += kQuantBlock) {
    const std::size_t count = n - start < kQuantBlock ? n - start : kQuantBlock;
    Planes tile = planes;
    tile.param = static_cast<char*>(planes.param) + start * param_nbytes;
    tile.lo = planes.lo + start;
    tile.grad = static_cast<const char*>(planes.grad) + start * grad_nbytes;
    for (std::size_t i = 0; i < kinds.size(); ++i) decode(kinds[i], planes, i, start, count, moments[i]);
    loop(tile, moments[0], moments[1], count, s);
    for (std::size_t i = 0; i < kinds.size(); ++i) encode(kinds[i], planes, i, start, count, moments[i], s);
  }
}

OFFLOAD_TARGET void update(Rule rule, Codec codec, GradDtype grad_dtype, const StatePlanes& kinds, const Planes& planes,
                           std::size_t n, const Scalars& s) {
  const bool is_split = codec == Codec::split_bf16, is_fp32 = grad_dtype == GradDtype::float32;
  RuleLoop loop =
      is_split ? (is_fp32 ? loop_of<std::uint16_t, float>(rule, s) : loop_of<std::uint16_t, std::uint16_t>(rule, s))
               : (is_fp32 ? loop_of<float, float>(rule, s) : loop_of<float, std::uint16_t>(rule, s));
  bool all_fp32 = true;
  for (const PlaneKind kind : kinds) all_fp32 = all_fp32 && kind == PlaneKind::float32;
  if (all_fp32)
    loop(planes, static_cast<float*>(planes.state[0]), static_cast<float*>(planes.state[1]), n, s);
  else
    update_tiles(loop, is_split ? 2 : 4, is_fp32 ? 4 : 2, kinds, planes, n, s);
}

OFFLOAD_TARGET void split(const float* __restrict__ source, std::uint16_t* __restrict__ hi,
                          std::int16_t* __restrict__ lo, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = bits_of(source[i]);
    hi[i] = hi_of(bits);
    lo[i] = lo_of(bits);
  }
}

OFFLOAD_TARGET void merge(const std::uint16_t* __restrict__ hi, const std::int16_t* __restrict__ lo,
                          float* __restrict__ destination, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) destination[i] = float_of(merged(hi[i], lo[i]));
}

OFFLOAD_TARGET void canonicalize_nan(float* values, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) values[i] = float_of(canonical(bits_of(values[i])));
}
