// The two CRC32C of a chunk, of its parameters and of its record, tile by tile: a checksum then finds what an update
// has just written in the core's cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "optim/update_job.h"

namespace offload::optim {

constexpr std::size_t kTileElements = 8192;  // parameters, state and gradients: 128 KB

class ChunkSums {
 public:
  // Of the `n` elements, whole blocks of kQuantBlock, whose parameters and record begin there.
  ChunkSums(const UpdateJob& job, const char* param, const char* record, std::size_t n);
  // The elements from `from` to before `to`, whole blocks too, which follow those added before.
  void add(std::size_t from, std::size_t to);
  // Of all parameters, and of the whole record with the bytes that fill its last page; once all elements are added.
  std::uint32_t of_param() const { return strips_[0].sum; }
  std::uint32_t of_record() const;

 private:
  // Bytes of a plane that follow each other: the parameters, lo, codes, or the absmax of codes.
  struct Strip {
    const char* at;
    std::size_t block_nbytes;  // of kQuantBlock elements
    std::uint32_t sum = 0;
  };
  std::vector<Strip> strips_;  // the parameters, then those of the record
  std::size_t n_blocks_;
  const char* padding_;
  std::size_t padding_nbytes_;
};

}  // namespace offload::optim
