// One flat buffer's update: where its bytes are, what is done with them, and what must hold of a job.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "io/ticket.h"
#include "optim/kernels.h"

namespace offload::optim {

constexpr std::size_t kPlaneElements = 2048;  // 2-byte planes of this many elements are whole pages

struct Segment {
  std::size_t start, n;
  Hyper hyper;
};

// What Rule::callback is called with: a piece of a chunk, inside one segment.
struct CallbackPiece {
  std::size_t segment;  // position in UpdateJob::segments
  Planes planes;        // of this piece
  std::size_t n;
};

// One flat buffer's update. Offsets of -1 mean "not on storage".
struct UpdateJob {
  Rule rule = Rule::adamw;
  StatePlanes planes{PlaneKind::float32, PlaneKind::float32};
  // Rule::callback: called on the pipeline's threads, for several pieces at once. An error fails the job.
  std::function<io::Error(const CallbackPiece&)> callback;
  Codec codec = Codec::split_bf16;
  std::size_t n_elements = 0;
  char* param = nullptr;  // plane in host memory, updated in place
  std::int64_t param_offset = -1;
  bool read_param = false;
  std::int64_t state_offset = -1;
  char* state_host = nullptr;
  std::size_t host_chunks = 0;
  const char* grad = nullptr;
  GradDtype grad_dtype = GradDtype::float32;
  std::int64_t grad_offset = -1;
  // The gradients may be read once this has completed (a copy from the device, or a write to grad_offset); null: now.
  std::shared_ptr<io::Ticket> grad_gate;
  std::vector<Segment> segments;
  // Elements, from the first to before the second, of the chunks that the job is for; empty: all. Whole chunks, sorted.
  std::vector<std::pair<std::size_t, std::size_t>> only;
  // Nothing is written before this has completed; null: at once. What completes it must not wait for this job, nor for
  // one behind it.
  std::shared_ptr<io::Ticket> write_gate;
  // Where the updated bytes go; -1: where they were read from. state_out_offset has room for the records of all chunks:
  // those that live in host memory are written there too.
  std::int64_t param_out_offset = -1;
  std::int64_t state_out_offset = -1;
  // Two CRC32C a chunk, of its parameters and of its record: written here of what is written, and compared with
  // `expected` before what was read is used. Null: neither. The memory outlives the job.
  std::uint32_t* checksums = nullptr;
  const std::uint32_t* expected = nullptr;
  std::int64_t tag = -1;  // comes back in the spans of its chunks
  // As UpdatePipeline::turn, for this job too: the root's, which comes last of a step and is needed first.
  bool reorders = false;
  // Its result is needed late: until the turn its chunks are taken only where no other job's can be worked on.
  bool held = false;

  std::size_t param_nbytes_per_element() const { return codec == Codec::split_bf16 ? 2 : 4; }
  std::size_t grad_nbytes_per_element() const { return grad_dtype == GradDtype::float32 ? 4 : 2; }
  // Of the record of `n` elements' state.
  std::size_t record_nbytes(std::size_t n) const { return optim::record_nbytes(codec, planes, n); }
};

struct ChunkToMove {
  std::size_t index;
  bool idle;  // no segment touches it
};

// The chunks that a job has to move, in the order of the update: those whose state is on storage evenly among those
// whose state is in host memory, so that the drive reads and writes while the others are computed. One without
// gradients keeps its state untouched, and is only read where the parameters have to come in anyway; where the job
// writes to another place, every chunk goes there.
std::vector<ChunkToMove> chunks_of(const UpdateJob& job, std::size_t chunk_elements);

// Throws std::invalid_argument, and says why, for a job that a pipeline cannot run whose chunk buffers have room for a
// record of so many bytes an element; without an engine nothing may be on storage.
void check(const UpdateJob& job, std::size_t chunk_elements, std::size_t record_nbytes_per_element, bool has_engine);

}  // namespace offload::optim
