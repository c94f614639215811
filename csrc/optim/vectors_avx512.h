// Sixteen floats, for moments_vectors_body.h. Included inside the namespace of the instruction set, once.

constexpr std::size_t kLanes = 16;
using Floats = __m512;
using Ints = __m512i;
using Table = __m512;

OFFLOAD_TARGET inline Table table_of(const float* sixteen) { return _mm512_load_ps(sixteen); }
OFFLOAD_TARGET inline Floats looked_up(Table table, Ints index) { return _mm512_permutexvar_ps(index, table); }
OFFLOAD_TARGET inline Floats all(float value) { return _mm512_set1_ps(value); }
OFFLOAD_TARGET inline Ints all(std::int32_t value) { return _mm512_set1_epi32(value); }
OFFLOAD_TARGET inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
OFFLOAD_TARGET inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
OFFLOAD_TARGET inline Ints load_bytes(const std::uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
OFFLOAD_TARGET inline Ints bits_of(Floats x) { return _mm512_castps_si512(x); }
OFFLOAD_TARGET inline Floats float_of(Ints x) { return _mm512_castsi512_ps(x); }
OFFLOAD_TARGET inline Floats converted(Ints x) { return _mm512_cvtepi32_ps(x); }
OFFLOAD_TARGET inline Ints truncated(Floats x) { return _mm512_cvttps_epi32(x); }

OFFLOAD_TARGET inline Floats sum(Floats a, Floats b) { return _mm512_add_ps(a, b); }
OFFLOAD_TARGET inline Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
OFFLOAD_TARGET inline Floats both(Floats a, Floats b) { return _mm512_and_ps(a, b); }
OFFLOAD_TARGET inline Floats exclusive(Floats a, Floats b) { return _mm512_xor_ps(a, b); }
// Rounds once.
OFFLOAD_TARGET inline Floats on_line(Floats start, Floats slope, Floats x) { return _mm512_fmadd_ps(slope, x, start); }
OFFLOAD_TARGET inline Floats larger_magnitude(Floats x, Floats bound) {
  return _mm512_range_ps(x, bound, 0b1011);  // the larger of the magnitudes, without a sign
}
OFFLOAD_TARGET inline Ints smaller(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
template <int count>
OFFLOAD_TARGET inline Ints shifted_down(Ints x) {
  return _mm512_srli_epi32(x, count);
}

// Of 16-bit numbers without sign.
OFFLOAD_TARGET inline Ints product_upper_16(Ints a, Ints b) { return _mm512_mulhi_epu16(a, b); }
OFFLOAD_TARGET inline Ints smaller_16(Ints a, Ints b) { return _mm512_min_epu16(a, b); }
// A bit a lane: whether the lower half is below `bound`.
OFFLOAD_TARGET inline unsigned lower_16_below(Ints x, std::int32_t bound) {
  return _mm512_cmplt_epi32_mask(_mm512_and_si512(x, all(0xFFFF)), all(bound));
}

OFFLOAD_TARGET inline Ints one_more_where_above(Ints x, Floats a, Floats b) {
  return _mm512_mask_add_epi32(x, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x, all(1));
}
OFFLOAD_TARGET inline Ints zero_unless_positive(Ints x, Floats sign) {
  return _mm512_maskz_mov_epi32(_mm512_cmpgt_epi32_mask(bits_of(sign), _mm512_setzero_si512()), x);
}
OFFLOAD_TARGET inline Ints negated_where_negative(Ints x, Floats sign) {
  return _mm512_mask_sub_epi32(x, _mm512_movepi32_mask(bits_of(sign)), _mm512_setzero_si512(), x);
}

// Four vectors of small numbers, plus `offset`, as bytes; what is below zero becomes zero.
OFFLOAD_TARGET inline void store_bytes(std::uint8_t* to, const Ints* four, std::int16_t offset) {
  const Ints added = _mm512_set1_epi16(offset);
  const Ints lower = _mm512_add_epi16(_mm512_packs_epi32(four[0], four[1]), added);
  const Ints upper = _mm512_add_epi16(_mm512_packs_epi32(four[2], four[3]), added);
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Ints bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(lower, upper));
  _mm512_storeu_si512(to, bytes);
}
