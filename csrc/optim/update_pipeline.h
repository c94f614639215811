// The out-of-core update: read chunk -> kernel -> write chunk, overlapped, for a queue of flat buffers.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io/engine.h"
#include "optim/kernels.h"

namespace offload::optim {

struct Segment {
  std::size_t start, n;
  Hyper hyper;
};

// One flat buffer's update. Offsets of -1 mean "not on storage".
struct UpdateJob {
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
  std::vector<Segment> segments;
};

std::size_t state_nbytes_per_element(Codec codec);

class UpdatePipeline {
 public:
  // `buffer` holds n_buffers chunk records, each followed by room for an fp32 gradient chunk.
  UpdatePipeline(std::shared_ptr<io::Engine> engine, std::size_t chunk_elements, std::size_t n_buffers,
                 std::size_t n_threads, char* buffer, std::size_t buffer_nbytes);
  ~UpdatePipeline();
  UpdatePipeline(const UpdatePipeline&) = delete;
  UpdatePipeline& operator=(const UpdatePipeline&) = delete;

  static std::size_t buffer_nbytes_required(std::size_t chunk_elements, std::size_t n_buffers);

  // Queues a job; its ticket completes when every write of it has.
  std::shared_ptr<io::Ticket> submit(UpdateJob job);
  // Finishes what is queued and stops the threads.
  void close();
  double kernel_seconds() const { return static_cast<double>(kernel_ns_.load()) * 1e-9; }

 private:
  struct JobState {
    UpdateJob job;
    std::size_t n_chunks = 0;
    std::size_t unfinished = 0;
    io::Error error;
    std::shared_ptr<io::Ticket> ticket;
  };
  struct Chunk {
    std::shared_ptr<JobState> job;
    std::size_t index = 0, n = 0;
    char* buffer = nullptr;
    std::atomic<std::size_t> pending{0};
    io::Error error;  // guarded by the pipeline's mutex
  };
  using ChunkPtr = std::shared_ptr<Chunk>;

  void work();
  void issue_reads(std::unique_lock<std::mutex>& lock);
  void compute(Chunk& chunk) const;
  void start_writes(const ChunkPtr& chunk);
  void finish(const ChunkPtr& chunk);
  void settle_io(const ChunkPtr& chunk, const io::Error& error, bool was_read);
  std::int64_t record_offset(const Chunk& chunk) const;
  char* record(const Chunk& chunk) const;

  std::shared_ptr<io::Engine> engine_;
  std::size_t chunk_elements_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<JobState>> jobs_;  // jobs that still have chunks to read
  std::size_t next_chunk_ = 0;                  // of jobs_.front()
  std::vector<char*> free_buffers_;
  std::size_t n_buffers_;
  std::deque<ChunkPtr> ready_, written_;
  bool issuing_ = false, closing_ = false;
  std::atomic<std::int64_t> kernel_ns_{0};
  std::vector<std::thread> threads_;
};

}  // namespace offload::optim
