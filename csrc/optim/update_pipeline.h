// The out-of-core update: read chunk -> kernel -> write chunk, overlapped, for a queue of flat buffers.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io/engine.h"
#include "optim/update_job.h"

namespace offload::optim {

// What a chunk did while spans were recorded: 'r'ead, 'u'pdate or 'w'rite, in seconds of the steady clock.
struct ChunkSpan {
  char kind;
  std::int64_t tag;
  double start_s, end_s;
};

constexpr std::size_t kRecordNbytesPerElement = 10;  // of split_bf16 with two fp32 planes

class UpdatePipeline {
 public:
  // `buffer` holds n_buffers chunk records, each followed by room for an fp32 gradient chunk. No record takes more than
  // `record_nbytes_per_element` for each element of a chunk.
  UpdatePipeline(std::shared_ptr<io::Engine> engine, std::size_t chunk_elements, std::size_t n_buffers,
                 std::size_t n_threads, char* buffer, std::size_t buffer_nbytes,
                 std::size_t record_nbytes_per_element = kRecordNbytesPerElement);
  ~UpdatePipeline();
  UpdatePipeline(const UpdatePipeline&) = delete;
  UpdatePipeline& operator=(const UpdatePipeline&) = delete;

  static std::size_t buffer_nbytes_required(std::size_t chunk_elements, std::size_t n_buffers,
                                            std::size_t record_nbytes_per_element = kRecordNbytesPerElement);

  // Queues a job; its ticket completes when every write of it has. Jobs may be queued on bytes that earlier jobs still
  // write: the later chunk waits. Chunks that no segment touches are neither read nor written, unless read_param is
  // set or there is a state_out_offset. Throws std::invalid_argument for a job that cannot run as described.
  std::shared_ptr<io::Ticket> submit(UpdateJob job);
  // The turn to the next forward: jobs that have not begun are put in the order of their tags, and none is held any
  // more, so that none of a later step goes before them.
  void turn();
  // Finishes what is queued and stops the threads.
  void close();
  // True in a process that was forked from the pipeline's: the threads are the parent's.
  bool inherited() const;
  // Seconds inside kernels, summed over the threads.
  double kernel_seconds() const { return static_cast<double>(kernel_ns_.load()) * 1e-9; }
  // Seconds in which what was read was compared with its checksums, summed over the threads.
  double verify_seconds() const { return static_cast<double>(verify_ns_.load()) * 1e-9; }
  // Seconds that threads slept while reads were in flight, summed over the threads.
  double wait_read_seconds() const { return static_cast<double>(wait_read_ns_.load()) * 1e-9; }
  std::uint64_t chunks_updated() const { return chunks_updated_.load(); }
  // Spans of the chunks that work from now on are kept, until they are taken; false stops it.
  void record_spans(bool on) { recording_ = on; }
  std::vector<ChunkSpan> take_spans();

 private:
  struct JobState {
    UpdateJob job;
    std::vector<ChunkToMove> chunks;
    std::size_t next = 0;  // of the chunks, to take
    std::size_t unfinished = 0;
    std::vector<Scalars> scalars;  // of each segment
    io::Error error;               // guarded by the pipeline's mutex
    std::shared_ptr<io::Ticket> ticket;
  };
  struct Range {
    std::uint64_t begin = 0, end = 0;
    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
  };
  struct Chunk {
    std::shared_ptr<JobState> job;
    std::size_t index = 0, n = 0;
    bool idle = false;
    char* buffer = nullptr;
    std::atomic<std::size_t> pending{0};
    io::Error error;               // guarded by the pipeline's mutex
    std::array<Range, 3> storage;  // read: extents of state, parameters and gradients; empty where not on storage
    std::array<Range, 2> written;  // extents of state and parameters that are written
    std::array<Range, 2> memory;   // the parameter plane and a record that lives in host memory
    double io_start_s = 0;         // of the reads or the writes in flight, while spans are recorded
    bool overlaps(const Chunk& other) const;
  };
  using ChunkPtr = std::shared_ptr<Chunk>;

  void reorder();
  std::deque<std::shared_ptr<JobState>>::iterator choose_job();
  void take_next_chunk();
  bool can_issue() const;
  bool drained() const { return next_ == nullptr && in_flight_.empty(); }
  void work();
  void issue_reads(std::unique_lock<std::mutex>& lock);
  void start_reads(const ChunkPtr& chunk, bool skip);
  void read_gradients(const ChunkPtr& chunk);
  // Updates a chunk, and sums what is to be written.
  io::Error compute(const Chunk& chunk) const;
  // Updates its elements from `begin` to before `end`.
  io::Error update(const Chunk& chunk, std::size_t begin, std::size_t end) const;
  // The planes of a chunk's elements from `at` on.
  Planes planes_at(const Chunk& chunk, std::size_t at) const;
  io::Error verify(const Chunk& chunk) const;
  void write_when_allowed(const ChunkPtr& chunk);
  void start_writes(const ChunkPtr& chunk);
  void finish(const ChunkPtr& chunk);
  void note(char kind, const Chunk& chunk, double start_s);
  void settle_io(const ChunkPtr& chunk, const io::Error& error, bool was_read);
  std::int64_t record_offset(const Chunk& chunk) const;
  char* record(const Chunk& chunk) const;
  char* grad_buffer(const Chunk& chunk) const;

  std::shared_ptr<io::Engine> engine_;
  std::size_t chunk_elements_;
  std::size_t record_nbytes_per_element_;
  const int owner_pid_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<JobState>> jobs_;  // jobs that still have chunks to take
  ChunkPtr next_;                               // the next chunk to read; null when every job is taken
  std::vector<ChunkPtr> in_flight_;             // chunks that own a buffer
  std::vector<char*> free_buffers_;
  std::size_t reading_ = 0;  // chunks whose reads are in flight
  std::deque<ChunkPtr> ready_, written_;
  bool issuing_ = false, closing_ = false;
  std::atomic<std::int64_t> kernel_ns_{0}, wait_read_ns_{0}, verify_ns_{0};
  std::atomic<std::uint64_t> chunks_updated_{0};
  std::atomic<bool> recording_{false};
  std::mutex spans_mutex_;
  std::vector<ChunkSpan> spans_;
  std::vector<std::thread> threads_;
};

}  // namespace offload::optim
