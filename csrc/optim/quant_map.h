// The dynamic tree quantisation of 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861, section 1.3).
//
// 256 values in [-1, 1] or [0, 1], seven decades of them: a decade has twice as many as the one below, equally spaced.
#pragma once

#include <cstdint>
#include <vector>

namespace offload::optim {

// The values of a decade: `items` of each sign, equally spaced between a tenth of its top and its top.
constexpr int kQuantDecades = 7;
unsigned quant_items(bool is_signed, int decade);
double quant_top(int decade);
double quant_value(bool is_signed, int decade, unsigned item);

struct QuantMap {
  explicit QuantMap(bool is_signed);

  // Ascending.
  float value[256];
  // Between value[i] and value[i + 1]; what is on it goes down. The last is infinite.
  float middle[256];
  // By the upper 16 bits of a float: middles below the least float with these. There is at most one more among them.
  std::vector<std::uint8_t> first;
  std::uint8_t zero;

  std::uint8_t nearest(float x) const {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const std::uint8_t code = first[bits >> 16];
    return static_cast<std::uint8_t>(code + (x > middle[code] ? 1 : 0));
  }
};

// Of first moments and of momentum: signed; of second moments: unsigned. Made once.
const QuantMap& quant_map(bool is_signed);

}  // namespace offload::optim
