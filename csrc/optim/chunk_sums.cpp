#include "optim/chunk_sums.h"

#include "common/crc32c.h"

namespace offload::optim {

ChunkSums::ChunkSums(const UpdateJob& job, const char* param, const char* record, std::size_t n)
    : n_blocks_(n / kQuantBlock) {
  const char* at = record;
  const auto add_strip = [&](std::size_t block_nbytes) {
    strips_.push_back({at, block_nbytes});
    at += n_blocks_ * block_nbytes;
  };
  strips_.push_back({param, kQuantBlock * job.param_nbytes_per_element()});
  if (job.codec == Codec::split_bf16) add_strip(lo_nbytes(job.codec, kQuantBlock));
  for (const PlaneKind kind : job.planes) {
    add_strip(kQuantBlock * code_nbytes(kind));
    if (is_quantised(kind)) add_strip(sizeof(float));
  }
  padding_ = at;
  padding_nbytes_ = job.record_nbytes(n) - static_cast<std::size_t>(at - record);
}

void ChunkSums::add(std::size_t from, std::size_t to) {
  for (Strip& strip : strips_)
    strip.sum = crc32c(strip.at + from / kQuantBlock * strip.block_nbytes,
                       (to - from) / kQuantBlock * strip.block_nbytes, strip.sum);
}

std::uint32_t ChunkSums::of_record() const {
  std::uint32_t sum = 0;
  for (std::size_t i = 1; i < strips_.size(); ++i)
    sum = crc32c_join(sum, strips_[i].sum, n_blocks_ * strips_[i].block_nbytes);
  return crc32c(padding_, padding_nbytes_, sum);
}

}  // namespace offload::optim
