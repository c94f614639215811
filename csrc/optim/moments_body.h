// Moments of another kind than fp32, a tile of at most kQuantBlock elements at a time. Included by kernels_body.h.
//
// bf16 moments are rounded up or down at random, up with the probability of what is cut off, so that the mean is exact:
// with beta2 = 0.999 a second moment changes by a thousandth a step, which rounding to the nearest of 256 values an
// octave would lose every time. The noise is a function of the seed, the step, and the element's place in its parameter
// alone: neither placement, chunks nor threads change a bit.
//
// 8-bit moments are the nearest value of a dynamic map (quant_map.h) times the largest magnitude of their block.

OFFLOAD_TARGET inline std::uint32_t noise(std::uint32_t counter, const std::uint32_t* keys) {
  std::uint32_t x = counter + keys[0];
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15) ^ keys[1]) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

OFFLOAD_TARGET inline void decode_bfloat16(const std::uint16_t* __restrict__ source, float* __restrict__ moments,
                                           std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) moments[i] = float_of(static_cast<std::uint32_t>(source[i]) << 16);
}

// `plane`: the first takes the lower half of the noise, the second the upper.
OFFLOAD_TARGET inline void encode_bfloat16(const float* __restrict__ moments, std::uint16_t* __restrict__ target,
                                           std::size_t n, std::uint32_t counter, std::size_t plane, const Scalars& s) {
  const std::uint32_t keys[2] = {s.noise_keys[0], s.noise_keys[1]};
  const unsigned shift = plane == 0 ? 0 : 16;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t added = noise(counter + static_cast<std::uint32_t>(i), keys) >> shift & 0xFFFFu;
    target[i] = static_cast<std::uint16_t>((bits_of(moments[i]) + added) >> 16);
  }
}

// A second moment above zero never becomes zero: an update divides by its root.
template <bool is_signed>
OFFLOAD_TARGET inline std::uint8_t code_of(const QuantMap& map, float moment, float share) {
  const unsigned code = map.nearest(share);
  const unsigned least = static_cast<unsigned>(!is_signed) & static_cast<unsigned>(moment > 0.0f);
  return static_cast<std::uint8_t>(code + (static_cast<unsigned>(code == 0) & least));
}

#if defined(OFFLOAD_HAS_VECTORS)
#include "optim/moments_vectors_body.h"
#endif

template <bool is_signed>
OFFLOAD_TARGET void decode_quantised(const std::uint8_t* __restrict__ codes, float absmax, float* __restrict__ moments,
                                     std::size_t n) {
  const QuantMap& map = quant_map(is_signed);
  std::size_t i = 0;
#if defined(OFFLOAD_HAS_VECTORS)
  i = decode_vectors<is_signed>(codes, absmax, moments, n);
#endif
  for (; i < n; ++i) moments[i] = map.value[codes[i]] * absmax;
}

// The largest of a block is found among the bits of magnitudes, where a NaN is larger than everything.
template <bool is_signed>
OFFLOAD_TARGET void encode_quantised(const float* __restrict__ moments, std::uint8_t* __restrict__ codes, float* absmax,
                                     std::size_t n) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = bits_of(moments[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  *absmax = float_of(largest);
  const float divisor = largest == 0 ? 1.0f : float_of(largest);
  const QuantMap& map = quant_map(is_signed);
  std::size_t done = 0;
#if defined(OFFLOAD_HAS_VECTORS)
  if (divisor >= 0x1p-126f && divisor <= 0x1p126f) done = encode_vectors<is_signed>(moments, codes, divisor, n);
#endif
  alignas(64) float share[kQuantBlock];
  for (std::size_t i = done; i < n; ++i) share[i] = moments[i] / divisor;
  for (std::size_t i = done; i < n; ++i) codes[i] = code_of<is_signed>(map, moments[i], share[i]);
}

OFFLOAD_TARGET void quantise(PlaneKind kind, const float* moments, std::uint8_t* codes, float* absmax, std::size_t n) {
  const auto encode_block = kind == PlaneKind::int8 ? &encode_quantised<true> : &encode_quantised<false>;
  for (std::size_t start = 0; start < n; start += kQuantBlock)
    encode_block(moments + start, codes + start, absmax + start / kQuantBlock,
                 n - start < kQuantBlock ? n - start : kQuantBlock);
}

OFFLOAD_TARGET void dequantise(PlaneKind kind, const std::uint8_t* codes, const float* absmax, float* moments,
                               std::size_t n) {
  const auto decode_block = kind == PlaneKind::int8 ? &decode_quantised<true> : &decode_quantised<false>;
  for (std::size_t start = 0; start < n; start += kQuantBlock)
    decode_block(codes + start, absmax[start / kQuantBlock], moments + start,
                 n - start < kQuantBlock ? n - start : kQuantBlock);
}

OFFLOAD_TARGET void decode(PlaneKind kind, const Planes& planes, std::size_t plane, std::size_t start, std::size_t n,
                           float* moments) {
  const void* source = planes.state[plane];
  if (kind == PlaneKind::float32)
    __builtin_memcpy(moments, static_cast<const float*>(source) + start, n * sizeof(float));
  else if (kind == PlaneKind::bfloat16)
    decode_bfloat16(static_cast<const std::uint16_t*>(source) + start, moments, n);
  else
    dequantise(kind, static_cast<const std::uint8_t*>(source) + start, planes.absmax[plane] + start / kQuantBlock,
               moments, n);
}

OFFLOAD_TARGET void encode(PlaneKind kind, const Planes& planes, std::size_t plane, std::size_t start, std::size_t n,
                           const float* moments, const Scalars& s) {
  void* target = planes.state[plane];
  if (kind == PlaneKind::float32)
    __builtin_memcpy(static_cast<float*>(target) + start, moments, n * sizeof(float));
  else if (kind == PlaneKind::bfloat16)
    encode_bfloat16(moments, static_cast<std::uint16_t*>(target) + start, n,
                    static_cast<std::uint32_t>(planes.element + start) - s.noise_origin, plane, s);
  else
    quantise(kind, moments, static_cast<std::uint8_t*>(target) + start, planes.absmax[plane] + start / kQuantBlock, n);
}
