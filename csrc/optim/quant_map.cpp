#include "optim/quant_map.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace offload::optim {

namespace {

float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

unsigned quant_items(bool is_signed, int decade) { return 1u << (is_signed ? decade : decade + 1); }

double quant_top(int decade) { return std::pow(10.0, decade - (kQuantDecades - 1)); }

double quant_value(bool is_signed, int decade, unsigned item) {
  return quant_top(decade) * (0.1 + 0.9 * (item + 0.5) / quant_items(is_signed, decade));
}

QuantMap::QuantMap(bool is_signed) : first(std::size_t{1} << 16), zero(0) {
  std::vector<double> values{0.0, 1.0};
  for (int decade = 0; decade < kQuantDecades; ++decade) {
    for (unsigned i = 0; i < quant_items(is_signed, decade); ++i) {
      const double mean = quant_value(is_signed, decade, i);
      values.push_back(mean);
      if (is_signed) values.push_back(-mean);
    }
  }
  std::sort(values.begin(), values.end());
  for (std::size_t i = 0; i < 256; ++i) {
    value[i] = static_cast<float>(values[i]);
    if (value[i] == 0.0f) zero = static_cast<std::uint8_t>(i);
  }
  for (std::size_t i = 0; i < 255; ++i) middle[i] = (value[i] + value[i + 1]) / 2;
  middle[255] = std::numeric_limits<float>::infinity();
  for (std::uint32_t upper = 0; upper < (1u << 16); ++upper) {
    const float least = float_of(upper < 0x8000u ? upper << 16 : upper << 16 | 0xFFFFu);
    if (!std::isnan(least))
      first[upper] = static_cast<std::uint8_t>(std::lower_bound(middle, middle + 255, least) - middle);
  }
}

const QuantMap& quant_map(bool is_signed) {
  static const QuantMap with_sign(true), without_sign(false);
  return is_signed ? with_sign : without_sign;
}

}  // namespace offload::optim
