#include "optim/quant_lines.h"

#include <cmath>

namespace offload::optim {

namespace {

constexpr int kPieces = kQuantDecades + 1;  // the last: one
constexpr double kEdgeShift = 0x1p-21;

// A line as the sum of two: the first a multiple of so large a step that neither product nor sum is rounded.
void set_value_line(QuantLines& lines, unsigned piece, double start, double slope, double largest) {
  const double step = std::exp2(std::ilogb(largest) - 20);
  const double coarse_start = std::round(start / step) * step, coarse_slope = std::round(slope / step) * step;
  lines.coarse_start.set(piece, coarse_start);
  lines.coarse_slope.set(piece, coarse_slope);
  lines.fine_start.set(piece, start - coarse_start);
  lines.fine_slope.set(piece, slope - coarse_slope);
}

}  // namespace

QuantLines::QuantLines(bool is_signed) {
  const QuantMap& map = quant_map(is_signed);
  const unsigned zero = map.zero;
  const auto middle = [&](unsigned distance) { return static_cast<double>(map.middle[zero + distance]); };

  // Exponents of x: -1 or 0 and 7 or 8 are of zero and of one, and equal in their last three bits.
  const unsigned zero_piece = is_signed ? 6 : 7;
  for (int decade = 0; decade < kQuantDecades; ++decade) {
    const double top = quant_top(decade), items = quant_items(is_signed, decade);
    const double step = 0.9 * top / items, first_x = items + (is_signed ? 0.5 : 0.0);
    const unsigned exponent = static_cast<unsigned>(std::ilogb(first_x)) + 127;
    set_value_line(*this, exponent % 8, quant_value(is_signed, decade, 0) - first_x * step, step, top);
  }
  // Zero: 1/2 or 1; one: 128 and 1/2, or 256. A 255th in steps of which all sums are exact.
  coarse_slope.set(zero_piece, is_signed ? 0x1p-7 : 0x1p-8);
  coarse_start.set(zero_piece, -0x1p-8);
  const double rest = is_signed ? 0.0 : 0x1p-16 + 0x1p-24 + 0x1p-32;
  fine_slope.set(zero_piece, rest);
  fine_start.set(zero_piece, -rest);

  for (unsigned piece = 0; piece < kPieces; ++piece) {
    const unsigned items = piece < kQuantDecades ? quant_items(is_signed, static_cast<int>(piece)) : 0;
    const unsigned first = is_signed ? (1u << piece) : (2u << piece) - 1;  // distance of its first code from zero's
    const unsigned end = items == 0 ? first + 1 : first + items;
    const double below = middle(first - 1);
    double rise, origin;
    if (piece == 0) {  // and zero: two codes, between the middles on both sides of the upper one
      rise = 1 / (middle(end - 1) - middle(end - 2));
      origin = end - 1 - middle(end - 2) * rise;
    } else if (items == 0) {
      rise = 20.0;
      origin = first - below * rise;
    } else {
      const double top = quant_top(static_cast<int>(piece));
      rise = items / (0.9 * top);
      origin = first - 0.1 * top * rise;
    }
    slope.set(piece, rise * (1 << kFractionBits));
    start.set(piece, origin * (1 << kFractionBits) + kNear);
    most.at[piece] = most.at[piece + 8] = static_cast<std::int32_t>(end << kFractionBits) - 1;
    // Above the edge before it; below the first nothing is.
    edge.set((piece + 7) % 8, piece == 0 ? 0.0 : below * (1 + (items == 0 ? -kEdgeShift : kEdgeShift)));
  }
}

const QuantLines& quant_lines(bool is_signed) {
  static const QuantLines with_sign(true), without_sign(false);
  return is_signed ? with_sign : without_sign;
}

}  // namespace offload::optim
