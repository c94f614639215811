#include "optim/update_pipeline.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "common/aligned_buffer.h"
#include "common/check.h"
#include "common/crc32c.h"
#include "common/forked.h"
#include "optim/chunk_sums.h"

namespace offload::optim {

namespace {

constexpr std::size_t kGradNbytesMax = 4;

std::int64_t nanoseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
}

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

io::Error error_of(const std::exception& thrown) {
  if (const auto* system = dynamic_cast<const std::system_error*>(&thrown))
    return {system->code().value(), thrown.what()};
  return {EINVAL, thrown.what()};
}

}  // namespace

std::size_t UpdatePipeline::buffer_nbytes_required(std::size_t chunk_elements, std::size_t n_buffers,
                                                   std::size_t record_nbytes_per_element) {
  return chunk_elements * (record_nbytes_per_element + kGradNbytesMax) * n_buffers;
}

UpdatePipeline::UpdatePipeline(std::shared_ptr<io::Engine> engine, std::size_t chunk_elements, std::size_t n_buffers,
                               std::size_t n_threads, char* buffer, std::size_t buffer_nbytes,
                               std::size_t record_nbytes_per_element)
    : engine_(std::move(engine)),
      chunk_elements_(chunk_elements),
      record_nbytes_per_element_(record_nbytes_per_element),
      owner_pid_(::getpid()) {
  const std::size_t need = buffer_nbytes_required(chunk_elements, n_buffers, record_nbytes_per_element);
  OFFLOAD_CHECK(chunk_elements > 0 && chunk_elements % kPlaneElements == 0,
                "chunk_elements must be a multiple of 2048");
  OFFLOAD_CHECK(n_buffers > 0 && n_threads > 0, "an update pipeline needs a buffer and a thread");
  OFFLOAD_CHECK(buffer_nbytes >= need, "the chunk buffers are too small");
  OFFLOAD_CHECK(buffer != nullptr && reinterpret_cast<std::uintptr_t>(buffer) % kPageNbytes == 0,
                "the chunk buffers must start on a page");
  for (std::size_t i = 0; i < n_buffers; ++i) free_buffers_.push_back(buffer + i * (need / n_buffers));
  try {
    for (std::size_t i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (...) {
    close();
    throw;
  }
}

UpdatePipeline::~UpdatePipeline() { close(); }

std::shared_ptr<io::Ticket> UpdatePipeline::submit(UpdateJob job) {
  refuse_forked(owner_pid_);
  check(job, chunk_elements_, record_nbytes_per_element_, engine_ != nullptr);
  auto state = std::make_shared<JobState>();
  state->chunks = chunks_of(job, chunk_elements_);
  state->unfinished = state->chunks.size();
  state->ticket = std::make_shared<io::Ticket>(1);
  if (state->chunks.empty()) {
    state->ticket->settle_piece({});
    return state->ticket;
  }
  for (const Segment& segment : job.segments) state->scalars.push_back(scalars_of(job.rule, segment.hyper));
  state->job = std::move(job);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    OFFLOAD_CHECK(!closing_, "the update pipeline is closed");
    jobs_.push_back(state);
    if (state->job.reorders) reorder();
    if (next_ == nullptr) take_next_chunk();
  }
  changed_.notify_one();
  return state->ticket;
}

void UpdatePipeline::reorder() {
  const bool has_begun = !jobs_.empty() && jobs_.front()->next > 0 && !jobs_.front()->job.held;
  for (const auto& waiting : jobs_) waiting->job.held = false;
  std::stable_sort(jobs_.begin() + (has_begun ? 1 : 0), jobs_.end(),
                   [](const auto& one, const auto& other) { return one->job.tag < other->job.tag; });
}

void UpdatePipeline::turn() {
  std::lock_guard<std::mutex> lock(mutex_);
  reorder();
}

bool UpdatePipeline::inherited() const { return ::getpid() != owner_pid_; }

void UpdatePipeline::close() {
  if (inherited()) return;
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
  if (chunk.index >= job.host_chunks || job.state_host == nullptr) return chunk.buffer;
  return job.state_host + chunk.index * job.record_nbytes(chunk_elements_);
}

char* UpdatePipeline::grad_buffer(const Chunk& chunk) const {
  return chunk.buffer + chunk_elements_ * record_nbytes_per_element_;
}

std::int64_t UpdatePipeline::record_offset(const Chunk& chunk) const {
  const UpdateJob& job = chunk.job->job;
  const std::size_t position = (chunk.index - job.host_chunks) * job.record_nbytes(chunk_elements_);
  return job.state_offset + static_cast<std::int64_t>(position);
}

bool UpdatePipeline::Chunk::overlaps(const Chunk& other) const {
  for (const Range& ours : storage)
    for (const Range& theirs : other.written)
      if (ours.overlaps(theirs)) return true;
  for (const Range& ours : written) {
    for (const Range& theirs : other.storage)
      if (ours.overlaps(theirs)) return true;
    for (const Range& theirs : other.written)
      if (ours.overlaps(theirs)) return true;
  }
  for (const Range& ours : memory)
    for (const Range& theirs : other.memory)
      if (ours.overlaps(theirs)) return true;
  return false;
}

// The first job that is not held; while its gradients are on their way, of the held ones whose gradients are there the
// one that is needed first.
std::deque<std::shared_ptr<UpdatePipeline::JobState>>::iterator UpdatePipeline::choose_job() {
  const auto arrived = [](const JobState& state) { return !state.job.grad_gate || state.job.grad_gate->done(); };
  const auto first = std::find_if(jobs_.begin(), jobs_.end(), [](const auto& state) { return !state->job.held; });
  if (first != jobs_.end() && arrived(**first)) return first;
  auto chosen = jobs_.end();
  for (auto each = jobs_.begin(); each != jobs_.end(); ++each)
    if ((*each)->job.held && arrived(**each) && (chosen == jobs_.end() || (*each)->job.tag < (*chosen)->job.tag))
      chosen = each;
  if (chosen != jobs_.end()) return chosen;
  return first != jobs_.end() ? first : jobs_.begin();
}

// Makes `next_` of a job that has chunks left, with the bytes the chunk will touch. Called with the lock.
void UpdatePipeline::take_next_chunk() {
  next_ = nullptr;
  if (jobs_.empty()) return;
  const auto chosen = choose_job();
  auto chunk = std::make_shared<Chunk>();
  chunk->job = *chosen;
  const ChunkToMove& next = chunk->job->chunks[chunk->job->next];
  chunk->index = next.index;
  chunk->idle = next.idle;
  const UpdateJob& job = chunk->job->job;
  const std::size_t start = chunk->index * chunk_elements_;
  chunk->n = std::min(chunk_elements_, job.n_elements - start);
  if (++chunk->job->next == chunk->job->chunks.size()) jobs_.erase(chosen);
  const auto range = [](std::uint64_t begin, std::uint64_t nbytes) { return Range{begin, begin + nbytes}; };
  const auto extent = [&](std::int64_t offset, std::size_t nbytes_per_element) {
    if (offset < 0) return Range{};
    return range(static_cast<std::uint64_t>(offset) + start * nbytes_per_element, chunk->n * nbytes_per_element);
  };
  const std::size_t param_nbytes = job.param_nbytes_per_element();
  const std::size_t record_nbytes = job.record_nbytes(chunk->n);
  chunk->storage[1] = extent(job.param_offset, param_nbytes);
  if (!chunk->idle) chunk->storage[2] = extent(job.grad_offset, job.grad_nbytes_per_element());
  chunk->memory[0] = range(reinterpret_cast<std::uintptr_t>(job.param) + start * param_nbytes, chunk->n * param_nbytes);
  if (chunk->index < job.host_chunks)
    chunk->memory[1] = range(reinterpret_cast<std::uintptr_t>(record(*chunk)), record_nbytes);
  else if (!chunk->idle && record_nbytes > 0)
    chunk->storage[0] = range(static_cast<std::uint64_t>(record_offset(*chunk)), record_nbytes);
  chunk->written = {chunk->storage[0], chunk->storage[1]};
  if (job.state_out_offset >= 0)
    chunk->written[0] =
        range(static_cast<std::uint64_t>(job.state_out_offset) + chunk->index * job.record_nbytes(chunk_elements_),
              record_nbytes);
  if (job.param_out_offset >= 0) chunk->written[1] = extent(job.param_out_offset, param_nbytes);
  next_ = std::move(chunk);
}

// A chunk whose bytes an earlier chunk still holds has to wait for its write: a read now would be a stale one.
bool UpdatePipeline::can_issue() const {
  if (issuing_ || next_ == nullptr || free_buffers_.empty()) return false;
  return std::none_of(in_flight_.begin(), in_flight_.end(),
                      [this](const ChunkPtr& chunk) { return chunk->overlaps(*next_); });
}

void UpdatePipeline::note(char kind, const Chunk& chunk, double start_s) {
  if (!recording_) return;
  std::lock_guard<std::mutex> lock(spans_mutex_);
  spans_.push_back({kind, chunk.job->job.tag, start_s, now_s()});
}

std::vector<ChunkSpan> UpdatePipeline::take_spans() {
  std::lock_guard<std::mutex> lock(spans_mutex_);
  return std::exchange(spans_, {});
}

void UpdatePipeline::settle_io(const ChunkPtr& chunk, const io::Error& error, bool was_read) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error.code != 0 && chunk->error.code == 0) chunk->error = error;
  if (chunk->pending.fetch_sub(1) != 1) return;
  if (chunk->io_start_s != 0) note(was_read ? 'r' : 'w', *chunk, chunk->io_start_s);
  if (was_read) --reading_;
  (was_read ? ready_ : written_).push_back(chunk);
  changed_.notify_one();  // under the lock: close() may destroy the pipeline as soon as it is released
}

// Starts the reads of as many chunks as there are free buffers, job after job without a drain in between.
void UpdatePipeline::issue_reads(std::unique_lock<std::mutex>& lock) {
  while (can_issue()) {
    issuing_ = true;  // one thread issues, so that chunks are read in order
    const ChunkPtr chunk = std::move(next_);
    take_next_chunk();
    chunk->buffer = free_buffers_.back();
    free_buffers_.pop_back();
    in_flight_.push_back(chunk);
    ++reading_;
    const bool skip = chunk->job->error.code != 0;
    lock.unlock();
    start_reads(chunk, skip);
    lock.lock();
    issuing_ = false;
  }
}

void UpdatePipeline::start_reads(const ChunkPtr& chunk, bool skip) {
  const UpdateJob& job = chunk->job->job;
  const std::size_t start = chunk->index * chunk_elements_;
  std::vector<std::shared_ptr<io::Ticket>> tickets;
  io::Error refused;
  const auto read = [&](char* to, const Range& from) {
    if (from.end > from.begin)
      tickets.push_back(engine_->submit(io::Op::read, to, static_cast<std::size_t>(from.end - from.begin), from.begin));
  };
  try {
    if (!skip) {
      read(chunk->buffer, chunk->storage[0]);
      if (job.read_param) read(job.param + start * job.param_nbytes_per_element(), chunk->storage[1]);
      if (!job.grad_gate) read(grad_buffer(*chunk), chunk->storage[2]);
    }
  } catch (const std::exception& error) {
    refused = error_of(error);
  }
  chunk->io_start_s = recording_ && !tickets.empty() ? now_s() : 0;
  const bool gated = job.grad_gate && !skip && refused.code == 0;
  chunk->pending = tickets.size() + 1 + (gated ? 1 : 0);
  for (const auto& ticket : tickets)
    ticket->on_complete([this, chunk](const io::Error& error) { settle_io(chunk, error, true); });
  if (gated)
    job.grad_gate->on_complete([this, chunk](const io::Error& error) {
      if (error.code != 0 || chunk->storage[2].end == 0)
        settle_io(chunk, error, true);
      else
        read_gradients(chunk);
    });
  settle_io(chunk, refused, true);
}

// The gate is open: the gradients that went to storage may be read back.
void UpdatePipeline::read_gradients(const ChunkPtr& chunk) {
  const Range& from = chunk->storage[2];
  try {
    engine_->submit(io::Op::read, grad_buffer(*chunk), static_cast<std::size_t>(from.end - from.begin), from.begin)
        ->on_complete([this, chunk](const io::Error& error) { settle_io(chunk, error, true); });
  } catch (const std::exception& error) {
    settle_io(chunk, error_of(error), true);
  }
}

Planes UpdatePipeline::planes_at(const Chunk& chunk, std::size_t at) const {
  const UpdateJob& job = chunk.job->job;
  const std::size_t start = chunk.index * chunk_elements_;
  const std::size_t grad_nbytes = job.grad_nbytes_per_element();
  const char* grad = job.grad_offset >= 0 ? grad_buffer(chunk) : job.grad + start * grad_nbytes;
  char* state = record(chunk);
  Planes planes{};
  planes.param = job.param + (start + at) * job.param_nbytes_per_element();
  planes.lo = reinterpret_cast<std::int16_t*>(state) + at;
  planes.grad = grad + at * grad_nbytes;
  planes.element = start + at;
  state += lo_nbytes(job.codec, chunk.n);
  for (std::size_t i = 0; i < job.planes.size(); ++i) {
    const PlaneKind kind = job.planes[i];
    planes.state[i] = state + at * code_nbytes(kind);
    if (is_quantised(kind)) planes.absmax[i] = reinterpret_cast<float*>(state + chunk.n) + at / kQuantBlock;
    state += plane_nbytes(kind, chunk.n);
  }
  return planes;
}

// Tile by tile where checksums are wanted of what is written; functions in Python get whole pieces.
io::Error UpdatePipeline::compute(const Chunk& chunk) const {
  const UpdateJob& job = chunk.job->job;
  if (job.checksums == nullptr) return update(chunk, 0, chunk.n);
  const char* const param = job.param + chunk.index * chunk_elements_ * job.param_nbytes_per_element();
  ChunkSums sums(job, param, record(chunk), chunk.n);
  const std::size_t tile = job.callback ? chunk.n : kTileElements;
  for (std::size_t from = 0; from < chunk.n; from += tile) {
    const std::size_t to = std::min(from + tile, chunk.n);
    const io::Error error = update(chunk, from, to);
    if (error.code != 0) return error;
    sums.add(from, to);
  }
  job.checksums[2 * chunk.index] = sums.of_param();
  job.checksums[2 * chunk.index + 1] = sums.of_record();
  return {};
}

io::Error UpdatePipeline::update(const Chunk& chunk, std::size_t begin, std::size_t end) const {
  const UpdateJob& job = chunk.job->job;
  const std::size_t start = chunk.index * chunk_elements_;
  const Kernels& best = kernels().back();
  for (std::size_t i = 0; i < job.segments.size(); ++i) {
    const Segment& segment = job.segments[i];
    const std::size_t from = std::max(segment.start, start + begin);
    const std::size_t to = std::min(segment.start + segment.n, start + end);
    if (from >= to) continue;
    const Planes planes = planes_at(chunk, from - start);
    if (job.callback) {
      const io::Error error = job.callback({i, planes, to - from});
      if (error.code != 0) return error;
    } else {
      best.update(job.rule, job.codec, job.grad_dtype, job.planes, planes, to - from, chunk.job->scalars[i]);
    }
  }
  return {};
}

// Whether what was read is what was written. The error names the first chunk that is not.
io::Error UpdatePipeline::verify(const Chunk& chunk) const {
  const UpdateJob& job = chunk.job->job;
  if (job.expected == nullptr) return {};
  const auto differs = [&](const char* data, const Range& from, std::uint32_t expected) -> io::Error {
    const auto nbytes = static_cast<std::size_t>(from.end - from.begin);
    if (nbytes == 0 || crc32c(data, nbytes) == expected) return {};
    return {EBADMSG, "read of " + std::to_string(nbytes) + " bytes at offset " + std::to_string(from.begin) +
                         " of the store " + engine_->path(0) +
                         ": its checksum is wrong, the drive has changed it; resume from the last committed step"};
  };
  const std::size_t start = chunk.index * chunk_elements_;
  io::Error error = differs(chunk.buffer, chunk.storage[0], job.expected[2 * chunk.index + 1]);
  if (error.code == 0 && job.read_param)
    error =
        differs(job.param + start * job.param_nbytes_per_element(), chunk.storage[1], job.expected[2 * chunk.index]);
  return error;
}

// A chunk that must not be written yet keeps its buffer; those behind it are read and computed in the others.
void UpdatePipeline::write_when_allowed(const ChunkPtr& chunk) {
  if (chunk->job->job.write_gate == nullptr) {
    start_writes(chunk);
    return;
  }
  chunk->job->job.write_gate->on_complete([this, chunk](const io::Error& error) {
    if (error.code == 0) {
      start_writes(chunk);
      return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    chunk->error = error;
    written_.push_back(chunk);
    changed_.notify_one();  // under the lock, as in settle_io
  });
}

void UpdatePipeline::start_writes(const ChunkPtr& chunk) {
  const UpdateJob& job = chunk->job->job;
  const std::size_t start = chunk->index * chunk_elements_;
  std::vector<std::shared_ptr<io::Ticket>> tickets;
  io::Error refused;
  const auto write = [&](char* from, const Range& to) {
    if (to.end > to.begin)
      tickets.push_back(engine_->submit(io::Op::write, from, static_cast<std::size_t>(to.end - to.begin), to.begin));
  };
  try {
    write(record(*chunk), chunk->written[0]);
    if (!chunk->idle) write(job.param + start * job.param_nbytes_per_element(), chunk->written[1]);
  } catch (const std::exception& error) {
    refused = error_of(error);
  }
  chunk->io_start_s = recording_ && !tickets.empty() ? now_s() : 0;
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
    in_flight_.erase(std::find(in_flight_.begin(), in_flight_.end(), chunk));
    JobState& job = *chunk->job;
    if (chunk->error.code != 0 && job.error.code == 0) job.error = chunk->error;
    if (--job.unfinished == 0) done = chunk->job;
  }
  changed_.notify_all();
  if (!done) return;
  done->job.callback = nullptr;  // dropping it may wait for Python, which may wait for the lock
  done->ticket->settle_piece(done->error);
}

void UpdatePipeline::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    while (!can_issue() && ready_.empty() && written_.empty() && !(closing_ && drained())) {
      const bool waits_for_reads = reading_ > 0;
      const auto begin = std::chrono::steady_clock::now();
      changed_.wait(lock);
      if (waits_for_reads) wait_read_ns_ += nanoseconds_since(begin);
    }
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
      bool failed = chunk->error.code != 0 || chunk->job->error.code != 0;
      lock.unlock();
      if (!failed) {
        const auto begin = std::chrono::steady_clock::now();
        const io::Error wrong = verify(*chunk);
        verify_ns_ += nanoseconds_since(begin);
        failed = wrong.code != 0;
        if (failed) chunk->error = wrong;  // no I/O of the chunk is in flight: nobody else looks at it
      }
      if (!failed) {
        const auto begin = std::chrono::steady_clock::now();
        const double start_s = now_s();
        const io::Error refused = compute(*chunk);
        failed = refused.code != 0;
        if (failed) chunk->error = refused;
        note('u', *chunk, start_s);
        kernel_ns_ += nanoseconds_since(begin);
        if (!failed && !chunk->idle) ++chunks_updated_;
      }
      if (failed)
        finish(chunk);
      else
        write_when_allowed(chunk);
      lock.lock();
      continue;
    }
    if (closing_ && drained()) return;
  }
}

}  // namespace offload::optim
