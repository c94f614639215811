// 8-bit moments by straight lines (quant_lines.h), in vectors. The bits are those of moments_body.h, which includes
// this where an instruction set brings vectors (vectors_*.h) and does the rest itself.

constexpr std::size_t kGroup = 4 * kLanes;  // whose codes are written at once

// How many were decoded: whole vectors.
template <bool is_signed>
OFFLOAD_TARGET inline std::size_t decode_vectors(const std::uint8_t* __restrict__ codes, float absmax,
                                                 float* __restrict__ moments, std::size_t n) {
  const QuantLines& lines = quant_lines(is_signed);
  const Table coarse_start = table_of(lines.coarse_start.at), coarse_slope = table_of(lines.coarse_slope.at);
  const Table fine_start = table_of(lines.fine_start.at), fine_slope = table_of(lines.fine_slope.at);
  const Floats scale = all(absmax), sign_bit = float_of(all(INT32_MIN));
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats x = converted(load_bytes(codes + i)), sign = all(0.0f);
    if constexpr (is_signed) {
      x = sum(x, all(-127.0f));
      sign = both(x, sign_bit);
      x = sum(exclusive(x, sign), all(0.5f));
    } else {
      x = sum(x, all(1.0f));
    }
    const Ints piece = shifted_down<23>(bits_of(x));
    const Floats coarse = on_line(looked_up(coarse_start, piece), looked_up(coarse_slope, piece), x);
    const Floats fine = on_line(looked_up(fine_start, piece), looked_up(fine_slope, piece), x);
    Floats value = sum(coarse, fine);
    if constexpr (is_signed) value = exclusive(value, sign);
    store(moments + i, product(value, scale));
  }
  return i;
}

// How many were encoded: whole groups. `divisor` is not below any magnitude, and neither subnormal nor so large that
// its inverse is.
template <bool is_signed>
OFFLOAD_TARGET inline std::size_t encode_vectors(const float* __restrict__ moments, std::uint8_t* __restrict__ codes,
                                                 float divisor, std::size_t n) {
  const QuantLines& lines = quant_lines(is_signed);
  const Table edge = table_of(lines.edge.at), start = table_of(lines.start.at), slope = table_of(lines.slope.at);
  const Table most = table_of(reinterpret_cast<const float*>(lines.most.at));
  const Floats inverse = all(1.0f / divisor), least = all(QuantLines::kShareMin);
  const QuantMap& map = quant_map(is_signed);
  const Ints piece_scale = all(QuantLines::kPieceScale << 16);
  unsigned unsure[kQuantBlock / kGroup];  // lanes of a group with a code that is not certain
  std::size_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    Ints four[4], nearest_whole = all(-1);
    for (std::size_t j = 0; j < 4; ++j) {
      const Floats x = load(moments + i + j * kLanes);
      const Floats y = larger_magnitude(product(x, inverse), least);
      Ints piece = shifted_down<16>(product_upper_16(bits_of(y), piece_scale));
      piece = one_more_where_above(piece, y, looked_up(edge, piece));
      const Ints at = truncated(on_line(looked_up(start, piece), looked_up(slope, piece), y));
      nearest_whole = smaller_16(nearest_whole, at);
      const Ints code = shifted_down<QuantLines::kFractionBits>(smaller(at, bits_of(looked_up(most, piece))));
      four[j] = is_signed ? negated_where_negative(code, x) : zero_unless_positive(code, x);
    }
    store_bytes(codes + i, four, is_signed ? 127 : 0);
    unsure[i / kGroup] = lower_16_below(nearest_whole, 2 * QuantLines::kNear);
  }
  for (std::size_t group = 0; group < i; group += kGroup)
    for (unsigned lanes = unsure[group / kGroup]; lanes != 0; lanes &= lanes - 1) {
      const std::size_t lane = group + static_cast<unsigned>(__builtin_ctz(lanes));
      for (std::size_t at = lane; at < group + kGroup; at += kLanes)
        codes[at] = code_of<is_signed>(map, moments[at], moments[at] / divisor);
    }
  return i;
}
