#include "optim/update_job.h"

#include <algorithm>

#include "common/aligned_buffer.h"
#include "common/check.h"

namespace offload::optim {

namespace {

bool on_page(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kPageNbytes == 0; }
bool on_page(std::int64_t offset) { return offset % static_cast<std::int64_t>(kPageNbytes) == 0; }
bool on_page_or_none(std::int64_t offset) { return offset < 0 || on_page(offset); }

// SGD may do without its plane.
bool has_planes_of_rule(const UpdateJob& job) {
  const std::size_t n = job.planes.size();
  if (job.rule == Rule::adamw) return n == 2;
  if (job.rule == Rule::lion) return n == 1;
  return job.rule == Rule::callback || n <= 1;
}

// Both lists in their own order, the longer of them among the shorter one evenly; where they are level `first` leads.
std::vector<ChunkToMove> mixed(const std::vector<ChunkToMove>& first, const std::vector<ChunkToMove>& second) {
  std::vector<ChunkToMove> both;
  std::size_t i = 0, j = 0;
  while (i < first.size() || j < second.size()) {
    const bool leads = i * second.size() <= j * first.size();
    both.push_back(j == second.size() || (i < first.size() && leads) ? first[i++] : second[j++]);
  }
  return both;
}

}  // namespace

std::vector<ChunkToMove> chunks_of(const UpdateJob& job, std::size_t chunk_elements) {
  std::vector<ChunkToMove> stored, in_memory;
  auto segment = job.segments.begin();
  const auto wanted = [&job](std::size_t start) {
    return job.only.empty() || std::any_of(job.only.begin(), job.only.end(), [start](const auto& range) {
             return range.first <= start && start < range.second;
           });
  };
  for (std::size_t start = 0; start < job.n_elements; start += chunk_elements) {
    if (!wanted(start)) continue;
    while (segment != job.segments.end() && segment->start + segment->n <= start) ++segment;
    const bool touched = segment != job.segments.end() && segment->start < start + chunk_elements;
    const bool idle = !touched && job.state_out_offset < 0;
    const std::size_t index = start / chunk_elements;
    if (!idle || job.read_param) (index < job.host_chunks ? in_memory : stored).push_back({index, idle});
  }
  return mixed(stored, in_memory);
}

void check(const UpdateJob& job, std::size_t chunk_elements, std::size_t record_nbytes_per_element, bool has_engine) {
  OFFLOAD_CHECK(job.n_elements > 0 && job.n_elements % kPlaneElements == 0, "n_elements must be a multiple of 2048");
  const std::size_t n_chunks = (job.n_elements + chunk_elements - 1) / chunk_elements;
  OFFLOAD_CHECK(job.param != nullptr, "an update needs the parameter plane in host memory");
  OFFLOAD_CHECK(job.grad != nullptr || job.grad_offset >= 0, "an update needs gradients");
  const std::size_t record_nbytes = job.record_nbytes(chunk_elements);
  const bool stores_state = job.host_chunks < n_chunks && record_nbytes > 0;
  OFFLOAD_CHECK(job.planes.size() <= kStatePlanesMax, "too many state planes");
  OFFLOAD_CHECK(record_nbytes <= chunk_elements * record_nbytes_per_element,
                "a record of this job is larger than the chunk buffers");
  OFFLOAD_CHECK((job.rule == Rule::callback) == (job.callback != nullptr), "a callback is what Rule::callback needs");
  OFFLOAD_CHECK(has_planes_of_rule(job), "these are not the state planes that the rule updates");
  OFFLOAD_CHECK(job.host_chunks == 0 || record_nbytes == 0 || job.state_host != nullptr,
                "host_chunks needs state_host_address");
  OFFLOAD_CHECK(!stores_state || job.state_offset >= 0, "state_offset is missing");
  OFFLOAD_CHECK(!job.read_param || job.param_offset >= 0, "read_param needs param_offset");
  OFFLOAD_CHECK(job.param_offset < 0 || (on_page(job.param) && on_page(job.param_offset)),
                "a parameter plane on storage must start on a page, in memory and in the store");
  OFFLOAD_CHECK(job.state_offset < 0 || on_page(job.state_offset), "state_offset must be a multiple of 4096");
  OFFLOAD_CHECK(job.grad_offset < 0 || on_page(job.grad_offset), "grad_offset must be a multiple of 4096");
  OFFLOAD_CHECK(on_page_or_none(job.param_out_offset) && on_page_or_none(job.state_out_offset),
                "param_out_offset and state_out_offset must be multiples of 4096");
  OFFLOAD_CHECK(job.param_out_offset < 0 || on_page(job.param),
                "a parameter plane that is written must start on a page");
  OFFLOAD_CHECK(job.state_out_offset < 0 || job.host_chunks == 0 || on_page(job.state_host),
                "records in host memory that are written must start on a page");
  const bool uses_storage = job.param_out_offset >= 0 || job.state_out_offset >= 0 || job.param_offset >= 0 ||
                            job.grad_offset >= 0 || stores_state;
  OFFLOAD_CHECK(!uses_storage || has_engine, "this update needs storage, and the pipeline has no engine");
  const bool quantised = std::any_of(job.planes.begin(), job.planes.end(), is_quantised);
  std::size_t end = 0;
  for (const Segment& segment : job.segments) {
    OFFLOAD_CHECK(!quantised || segment.start % kQuantBlock == 0,
                  "with 8-bit moments segments start at a multiple of 256");
    OFFLOAD_CHECK(job.rule != Rule::sgd || segment.hyper.momentum == 0.0 || !job.planes.empty(),
                  "momentum needs a state plane");
    OFFLOAD_CHECK(
        segment.start >= end && segment.start <= job.n_elements && segment.n <= job.n_elements - segment.start,
        "segments must be sorted, disjoint and inside the buffer");
    end = segment.start + segment.n;
  }
}

}  // namespace offload::optim
