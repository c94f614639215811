// A dynamic map (quant_map.h) as straight lines, one a decade, for processors that look eight numbers up at once.
//
// Values: exact. Codes: certain but for shares close to a middle, which are told from the others.
#pragma once

#include <cstdint>

#include "optim/quant_map.h"

namespace offload::optim {

// Twice eight floats: vectors of eight take the first half, those of sixteen the whole.
struct alignas(64) LineTable {
  float at[16];
  void set(unsigned piece, double number) { at[piece] = at[piece + 8] = static_cast<float>(number); }
};

struct QuantLines {
  explicit QuantLines(bool is_signed);

  // The value of a code: with x = |code - 127| + 1/2 where there is a sign, x = code + 1 where there is none, and the
  // table's entry that the last three bits of x's exponent say,
  //   (coarse_start + x * coarse_slope) + (fine_start + x * fine_slope).
  // The first sum is exact, so that only the last addition rounds. A piece is a decade; zero and one share one.
  LineTable coarse_start, coarse_slope, fine_start, fine_slope;

  // The code of a share y, at least kShareMin: with n the upper 16 bits of y times kPieceScale, shifted down by 16, and
  // the entry that the last three bits of n, or of n + 1 where y is above edge[n], say, the whole part of
  //   start + y * slope, at most `most` (in units of 2^-kFractionBits),
  // is the code, or how far it is from zero's: for certain, where the fraction is not below 2 * kNear units. At a
  // middle it is kNear, and y, the middles and this sum together are at most 5.3 units off: of y three roundings, of a
  // middle two, of the sum and its operands four. Just below a decade the line of the lower one is at a whole number
  // too, and the edges here are so much higher (that of one: lower) that a y on the wrong side of one is near a whole
  // number.
  LineTable edge, start, slope;
  struct alignas(64) {
    std::int32_t at[16];
  } most;
  static constexpr int kFractionBits = 16, kPieceScale = 154, kNear = 6;
  static constexpr float kShareMin = 1e-7f;
};

const QuantLines& quant_lines(bool is_signed);

}  // namespace offload::optim
