#include "optim/update_pipeline.h"

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "common/check.h"

namespace offload::optim {

namespace {
constexpr std::size_t kPlaneElements = 2048;  // 2-byte planes of this many elements are whole pages
constexpr std::size_t kRecordNbytesMax = 10, kGradNbytes = 4;
std::size_t param_nbytes_per_element(Codec codec) { return codec == Codec::split_bf16 ? 2 : 4; }
}  // namespace

std::size_t state_nbytes_per_element(Codec codec) { return codec == Codec::split_bf16 ? 10 : 8; }

std::size_t UpdatePipeline::buffer_nbytes_required(std::size_t chunk_elements, std::size_t n_buffers) {
  return chunk_elements * (kRecordNbytesMax + kGradNbytes) * n_buffers;
}

UpdatePipeline::UpdatePipeline(std::shared_ptr<io::Engine> engine, std::size_t chunk_elements, std::size_t n_buffers,
                               std::size_t n_threads, char* buffer, std::size_t buffer_nbytes)
    : engine_(std::move(engine)), chunk_elements_(chunk_elements), n_buffers_(n_buffers) {
  OFFLOAD_CHECK(chunk_elements > 0 && chunk_elements % kPlaneElements == 0, "chunk_elements must be a multiple of 2048");
  OFFLOAD_CHECK(n_buffers > 0 && n_threads > 0, "an update pipeline needs a buffer and a thread");
  OFFLOAD_CHECK(buffer_nbytes >= buffer_nbytes_required(chunk_elements, n_buffers), "the chunk buffers are too small");
  for (std::size_t i = 0; i < n_buffers; ++i)
    free_buffers_.push_back(buffer + i * buffer_nbytes_required(chunk_elements, 1));
  for (std::size_t i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
}

UpdatePipeline::~UpdatePipeline() { close(); }

std::shared_ptr<io::Ticket> UpdatePipeline::submit(UpdateJob job) {
  OFFLOAD_CHECK(job.n_elements > 0 && job.n_elements % kPlaneElements == 0, "n_elements must be a multiple of 2048");
  OFFLOAD_CHECK(job.param != nullptr, "an update needs the parameter plane in host memory");
  std::size_t end = 0;
  for (const Segment& segment : job.segments) {
    OFFLOAD_CHECK(segment.start >= end && segment.start + segment.n <= job.n_elements,
                  "segments must be sorted, disjoint and inside the buffer");
    end = segment.start + segment.n;
  }
  auto state = std::make_shared<JobState>();
  state->n_chunks = (job.n_elements + chunk_elements_ - 1) / chunk_elements_;
  OFFLOAD_CHECK(job.host_chunks == 0 || job.state_host != nullptr, "host_chunks needs state_host_address");
  OFFLOAD_CHECK(job.host_chunks >= state->n_chunks || job.state_offset >= 0, "state_offset is missing");
  OFFLOAD_CHECK(job.grad != nullptr || job.grad_offset >= 0, "an update needs gradients");
  const bool uses_storage =
      job.param_offset >= 0 || job.grad_offset >= 0 || job.host_chunks < state->n_chunks || job.read_param;
  OFFLOAD_CHECK(!uses_storage || engine_ != nullptr, "this update needs storage, and the pipeline has no engine");
  state->unfinished = state->n_chunks;
  state->ticket = std::make_shared<io::Ticket>(1);
  state->job = std::move(job);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    OFFLOAD_CHECK(!closing_, "the update pipeline is closed");
    jobs_.push_back(state);
  }
  changed_.notify_one();
  return state->ticket;
}

void UpdatePipeline::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
}

char* UpdatePipeline::record(const Chunk& chunk) const {
  const UpdateJob& job = chunk.job->job;
  if (chunk.index >= job.host_chunks) return chunk.buffer;
  return job.state_host + chunk.index * chunk_elements_ * state_nbytes_per_element(job.codec);
}

std::int64_t UpdatePipeline::record_offset(const Chunk& chunk) const {
  const UpdateJob& job = chunk.job->job;
  const std::size_t position = (chunk.index - job.host_chunks) * chunk_elements_ * state_nbytes_per_element(job.codec);
  return job.state_offset + static_cast<std::int64_t>(position);
}

void UpdatePipeline::settle_io(const ChunkPtr& chunk, const io::Error& error, bool was_read) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error.code != 0 && chunk->error.code == 0) chunk->error = error;
  if (chunk->pending.fetch_sub(1) != 1) return;
  (was_read ? ready_ : written_).push_back(chunk);
  changed_.notify_one();  // under the lock: close() may destroy the pipeline as soon as it is released
}

// Starts the reads of as many chunks as there are free buffers, job after job without a drain in between.
void UpdatePipeline::issue_reads(std::unique_lock<std::mutex>& lock) {
  if (issuing_) return;  // one thread issues, so that chunks are read in order
  issuing_ = true;
  while (!jobs_.empty() && !free_buffers_.empty()) {
    auto chunk = std::make_shared<Chunk>();
    chunk->job = jobs_.front();
    chunk->index = next_chunk_;
    chunk->buffer = free_buffers_.back();
    free_buffers_.pop_back();
    const UpdateJob& job = chunk->job->job;
    const std::size_t start = chunk->index * chunk_elements_;
    chunk->n = std::min(chunk_elements_, job.n_elements - start);
    if (++next_chunk_ == chunk->job->n_chunks) {
      jobs_.pop_front();
      next_chunk_ = 0;
    }
    lock.unlock();
    const std::size_t param_nbytes = param_nbytes_per_element(job.codec);
    std::vector<std::shared_ptr<io::Ticket>> tickets;
    io::Error refused;
    try {
      if (chunk->index >= job.host_chunks)
        tickets.push_back(engine_->submit(io::Op::read, chunk->buffer,
                                          chunk->n * state_nbytes_per_element(job.codec),
                                          static_cast<std::uint64_t>(record_offset(*chunk))));
      if (job.read_param)
        tickets.push_back(
            engine_->submit(io::Op::read, job.param + start * param_nbytes, chunk->n * param_nbytes,
                            static_cast<std::uint64_t>(job.param_offset) + start * param_nbytes));
      if (job.grad_offset >= 0) {
        const std::size_t grad_nbytes = job.grad_dtype == GradDtype::float32 ? 4 : 2;
        tickets.push_back(engine_->submit(io::Op::read, chunk->buffer + chunk_elements_ * kRecordNbytesMax,
                                          chunk->n * grad_nbytes,
                                          static_cast<std::uint64_t>(job.grad_offset) + start * grad_nbytes));
      }
    } catch (const std::exception& error) {
      refused = {EINVAL, error.what()};
    }
    chunk->pending = tickets.size() + 1;
    for (const auto& ticket : tickets)
      ticket->on_complete([this, chunk](const io::Error& error) { settle_io(chunk, error, true); });
    settle_io(chunk, refused, true);
    lock.lock();
  }
  issuing_ = false;
}

void UpdatePipeline::compute(Chunk& chunk) const {
  const UpdateJob& job = chunk.job->job;
  char* state = record(chunk);
  const std::size_t start = chunk.index * chunk_elements_;
  const std::size_t param_nbytes = param_nbytes_per_element(job.codec);
  const std::size_t grad_nbytes = job.grad_dtype == GradDtype::float32 ? 4 : 2;
  const std::size_t lo_nbytes = job.codec == Codec::split_bf16 ? 2 * chunk.n : 0;
  const char* grad = job.grad_offset >= 0 ? chunk.buffer + chunk_elements_ * kRecordNbytesMax
                                          : job.grad + start * grad_nbytes;
  const Kernels& best = kernels_at("auto");
  for (const Segment& segment : job.segments) {
    const std::size_t from = std::max(segment.start, start);
    const std::size_t to = std::min(segment.start + segment.n, start + chunk.n);
    if (from >= to) continue;
    const std::size_t at = from - start;
    const Planes planes{job.param + from * param_nbytes, reinterpret_cast<std::int16_t*>(state) + at,
                        reinterpret_cast<float*>(state + lo_nbytes) + at,
                        reinterpret_cast<float*>(state + lo_nbytes + 4 * chunk.n) + at, grad + at * grad_nbytes};
    best.update(job.codec, job.grad_dtype, planes, to - from, scalars_of(segment.hyper));
  }
}

void UpdatePipeline::start_writes(const ChunkPtr& chunk) {
  const UpdateJob& job = chunk->job->job;
  const std::size_t start = chunk->index * chunk_elements_;
  const std::size_t param_nbytes = param_nbytes_per_element(job.codec);
  std::vector<std::shared_ptr<io::Ticket>> tickets;
  io::Error refused;
  try {
    if (chunk->index >= job.host_chunks)
      tickets.push_back(engine_->submit(io::Op::write, chunk->buffer,
                                        chunk->n * state_nbytes_per_element(job.codec),
                                        static_cast<std::uint64_t>(record_offset(*chunk))));
    if (job.param_offset >= 0)
      tickets.push_back(engine_->submit(io::Op::write, job.param + start * param_nbytes, chunk->n * param_nbytes,
                                        static_cast<std::uint64_t>(job.param_offset) + start * param_nbytes));
  } catch (const std::exception& error) {
    refused = {EINVAL, error.what()};
  }
  chunk->pending = tickets.size() + 1;
  for (const auto& ticket : tickets)
    ticket->on_complete([this, chunk](const io::Error& error) { settle_io(chunk, error, false); });
  settle_io(chunk, refused, false);
}

// Gives the buffer back and completes the job with its last chunk. Called without the lock.
void UpdatePipeline::finish(const ChunkPtr& chunk) {
  std::shared_ptr<JobState> done;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    free_buffers_.push_back(chunk->buffer);
    JobState& job = *chunk->job;
    if (chunk->error.code != 0 && job.error.code == 0) job.error = chunk->error;
    if (--job.unfinished == 0) done = chunk->job;
  }
  changed_.notify_all();
  if (done) done->ticket->settle_piece(done->error);
}

void UpdatePipeline::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] {
      const bool can_issue = !issuing_ && !jobs_.empty() && !free_buffers_.empty();
      const bool drained = jobs_.empty() && free_buffers_.size() == n_buffers_;
      return can_issue || !ready_.empty() || !written_.empty() || (closing_ && drained);
    });
    if (!written_.empty()) {
      const ChunkPtr chunk = written_.front();
      written_.pop_front();
      lock.unlock();
      finish(chunk);
      lock.lock();
      continue;
    }
    issue_reads(lock);
    if (!ready_.empty()) {
      const ChunkPtr chunk = ready_.front();
      ready_.pop_front();
      const bool failed = chunk->error.code != 0 || chunk->job->error.code != 0;
      lock.unlock();
      if (failed) {
        finish(chunk);
      } else {
        const auto begin = std::chrono::steady_clock::now();
        compute(*chunk);
        const auto spent = std::chrono::steady_clock::now() - begin;
        kernel_ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
        start_writes(chunk);
      }
      lock.lock();
      continue;
    }
    if (closing_ && jobs_.empty() && free_buffers_.size() == n_buffers_) return;
  }
}

}  // namespace offload::optim
