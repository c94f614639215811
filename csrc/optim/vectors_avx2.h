// Eight floats, for moments_vectors_body.h. Included inside the namespace of the instruction set, once.

constexpr std::size_t kLanes = 8;
using Floats = __m256;
using Ints = __m256i;
using Table = __m256;

OFFLOAD_TARGET inline Table table_of(const float* eight) { return _mm256_load_ps(eight); }
OFFLOAD_TARGET inline Floats looked_up(Table table, Ints index) { return _mm256_permutevar8x32_ps(table, index); }
OFFLOAD_TARGET inline Floats all(float value) { return _mm256_set1_ps(value); }
OFFLOAD_TARGET inline Ints all(std::int32_t value) { return _mm256_set1_epi32(value); }
OFFLOAD_TARGET inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
OFFLOAD_TARGET inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
OFFLOAD_TARGET inline Ints load_bytes(const std::uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
OFFLOAD_TARGET inline Ints bits_of(Floats x) { return _mm256_castps_si256(x); }
OFFLOAD_TARGET inline Floats float_of(Ints x) { return _mm256_castsi256_ps(x); }
OFFLOAD_TARGET inline Floats converted(Ints x) { return _mm256_cvtepi32_ps(x); }
OFFLOAD_TARGET inline Ints truncated(Floats x) { return _mm256_cvttps_epi32(x); }

OFFLOAD_TARGET inline Floats sum(Floats a, Floats b) { return _mm256_add_ps(a, b); }
OFFLOAD_TARGET inline Floats product(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
OFFLOAD_TARGET inline Floats both(Floats a, Floats b) { return _mm256_and_ps(a, b); }
OFFLOAD_TARGET inline Floats exclusive(Floats a, Floats b) { return _mm256_xor_ps(a, b); }
// Either may round.
OFFLOAD_TARGET inline Floats on_line(Floats start, Floats slope, Floats x) { return sum(start, product(slope, x)); }
OFFLOAD_TARGET inline Floats larger_magnitude(Floats x, Floats bound) {
  return _mm256_max_ps(both(x, float_of(all(INT32_MAX))), bound);
}
OFFLOAD_TARGET inline Ints smaller(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
template <int count>
OFFLOAD_TARGET inline Ints shifted_down(Ints x) {
  return _mm256_srli_epi32(x, count);
}

// Of 16-bit numbers without sign.
OFFLOAD_TARGET inline Ints product_upper_16(Ints a, Ints b) { return _mm256_mulhi_epu16(a, b); }
OFFLOAD_TARGET inline Ints smaller_16(Ints a, Ints b) { return _mm256_min_epu16(a, b); }
// A bit a lane: whether the lower half is below `bound`.
OFFLOAD_TARGET inline unsigned lower_16_below(Ints x, std::int32_t bound) {
  const Ints lower = _mm256_and_si256(x, all(0xFFFF));
  return static_cast<unsigned>(_mm256_movemask_ps(float_of(_mm256_cmpgt_epi32(all(bound), lower))));
}

OFFLOAD_TARGET inline Ints one_more_where_above(Ints x, Floats a, Floats b) {
  return _mm256_sub_epi32(x, bits_of(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
// What is below zero may stay so: it is stored as zero.
OFFLOAD_TARGET inline Ints zero_unless_positive(Ints x, Floats sign) { return _mm256_sign_epi32(x, bits_of(sign)); }
OFFLOAD_TARGET inline Ints negated_where_negative(Ints x, Floats sign) { return _mm256_sign_epi32(x, bits_of(sign)); }

// Four vectors of small numbers, plus `offset`, as bytes; what is below zero becomes zero.
OFFLOAD_TARGET inline void store_bytes(std::uint8_t* to, const Ints* four, std::int16_t offset) {
  const Ints added = _mm256_set1_epi16(offset);
  const Ints lower = _mm256_add_epi16(_mm256_packs_epi32(four[0], four[1]), added);
  const Ints upper = _mm256_add_epi16(_mm256_packs_epi32(four[2], four[3]), added);
  const Ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const Ints bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(lower, upper), order);
  _mm256_storeu_si256(reinterpret_cast<Ints*>(to), bytes);
}
