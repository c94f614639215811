// Updates under sanitizers: every rule with every kind of moments, ragged segments, threads, callbacks that fail.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "common/aligned_buffer.h"
#include "optim/update_pipeline.h"

using namespace offload;
using namespace offload::optim;

namespace {

constexpr std::size_t kElements = 10240, kChunk = 4096, kJobs = 3;

struct Case {
  Rule rule;
  StatePlanes planes;
};

std::vector<Case> cases() {
  std::vector<Case> all{{Rule::sgd, {}}};
  for (const PlaneKind kind : {PlaneKind::float32, PlaneKind::bfloat16, PlaneKind::int8}) {
    const PlaneKind second = kind == PlaneKind::int8 ? PlaneKind::uint8 : kind;
    all.push_back({Rule::adamw, {kind, second}});
    all.push_back({Rule::sgd, {kind}});
    all.push_back({Rule::lion, {kind}});
  }
  return all;
}

Hyper hyper(bool momentum) {
  Hyper made;
  made.step = 2;
  made.momentum = momentum ? 0.9 : 0.0;
  return made;
}

// A store with the states of all jobs, and the memory that they are updated through.
struct Run {
  std::string path = "update.XXXXXX";
  std::shared_ptr<io::Engine> engine;
  AlignedBuffer params{kJobs * kElements * 2}, grads{kElements * 4};
  AlignedBuffer buffers{UpdatePipeline::buffer_nbytes_required(kChunk, 3)};
  std::unique_ptr<UpdatePipeline> pipeline;

  Run() {
    const int descriptor = ::mkstemp(path.data());
    if (descriptor < 0 || ::posix_fallocate(descriptor, 0, 8 << 20) != 0) std::abort();
    ::close(descriptor);
    io::EngineOptions options;
    options.backend = "posix";
    options.paths = {path};
    engine = std::make_shared<io::Engine>(options);
    std::memset(params.address(), 0, params.nbytes());
    auto* grad = static_cast<float*>(grads.address());
    for (std::size_t i = 0; i < kElements; ++i) grad[i] = std::sin(static_cast<float>(i));
    pipeline =
        std::make_unique<UpdatePipeline>(engine, kChunk, 3, 3, static_cast<char*>(buffers.address()), buffers.nbytes());
  }
  ~Run() {
    pipeline->close();
    engine->close();
    ::unlink(path.c_str());
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  UpdateJob job(const Case& what, std::size_t index) {
    UpdateJob made;
    made.rule = what.rule;
    made.planes = what.planes;
    made.n_elements = kElements;
    made.param = static_cast<char*>(params.address()) + index * kElements * 2;
    made.state_offset = static_cast<std::int64_t>(index * (1 << 20));
    made.grad = static_cast<const char*>(grads.address());
    const bool momentum = what.rule == Rule::sgd && !what.planes.empty();
    made.segments = {{0, 300, hyper(momentum)}, {512, 9000, hyper(momentum)}};
    return made;
  }

  bool moved(std::size_t index, std::size_t element) const {
    return static_cast<const std::uint16_t*>(params.address())[index * kElements + element] != 0;
  }
};

void every_rule_updates_what_segments_cover() {
  for (const Case& what : cases()) {
    Run run;
    std::vector<std::shared_ptr<io::Ticket>> tickets;
    for (std::size_t i = 0; i < kJobs; ++i) tickets.push_back(run.pipeline->submit(run.job(what, i)));
    for (const auto& ticket : tickets) expect(wait(ticket) && ticket->error().code == 0, "an update completes");
    for (std::size_t i = 0; i < kJobs; ++i) {
      expect(run.moved(i, 299) && run.moved(i, 513) && run.moved(i, 9511), "elements inside segments move");
      expect(!run.moved(i, 300) && !run.moved(i, 511) && !run.moved(i, 9512), "elements outside do not");
    }
  }
}

void callbacks_run_on_many_threads_and_may_fail() {
  Run run;
  std::atomic<int> calls{0};
  const Case what{Rule::callback, {PlaneKind::float32, PlaneKind::float32}};
  std::vector<std::shared_ptr<io::Ticket>> tickets;
  for (std::size_t i = 0; i < kJobs; ++i) {
    UpdateJob job = run.job(what, i);
    job.callback = [&calls, i](const CallbackPiece& piece) -> io::Error {
      ++calls;
      static_cast<float*>(piece.planes.state[1])[piece.n - 1] = 1.0f;
      return i == 1 ? io::Error{EINVAL, "no"} : io::Error{};
    };
    tickets.push_back(run.pipeline->submit(std::move(job)));
  }
  for (std::size_t i = 0; i < kJobs; ++i) {
    expect(wait(tickets[i]), "a job ends");
    expect((tickets[i]->error().code == EINVAL) == (i == 1), "only the job whose callback fails fails");
  }
  expect(calls >= 9, "every piece is called for");
}

void jobs_that_cannot_run_are_refused() {
  Run run;
  const auto refused = [&](const UpdateJob& job) {
    try {
      run.pipeline->submit(job);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  UpdateJob job = run.job({Rule::adamw, {PlaneKind::float32}}, 0);
  expect(refused(job), "AdamW with one plane is refused");
  job = run.job({Rule::lion, {PlaneKind::int8}}, 0);
  job.segments[1].start = 500;
  expect(refused(job), "a segment in the middle of a quantised block is refused");
  job = run.job({Rule::callback, {}}, 0);
  expect(refused(job), "a callback rule without a callback is refused");
}

}  // namespace

int main() {
  every_rule_updates_what_segments_cover();
  callbacks_run_on_many_threads_and_may_fail();
  jobs_that_cannot_run_are_refused();
  return failures == 0 ? 0 : 1;
}
