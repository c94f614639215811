// The engine under sanitizers: both backends, many tickets from many threads, short transfers, errors, close races.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "common/aligned_buffer.h"
#include "io/engine.h"

using namespace offload;
using namespace offload::io;

namespace {

constexpr std::size_t kMib = std::size_t{1} << 20;

std::string make_file(const std::string& name) {
  std::string path = name + ".XXXXXX";
  const int descriptor = ::mkstemp(path.data());
  if (descriptor < 0 || ::ftruncate(descriptor, 16 * static_cast<off_t>(kMib)) != 0) std::abort();
  ::close(descriptor);
  return path;
}

void round_trips(const std::string& backend, std::uint64_t short_every) {
  EngineOptions options;
  options.paths = {make_file("drive-a"), make_file("drive-b")};
  options.backend = backend;
  options.block_nbytes = 64 << 10;
  options.stripe_nbytes = 128 << 10;
  options.queue_depth = 4;
  if (short_every != 0) {
    options.faults = std::make_shared<Faults>();
    options.faults->short_every = short_every;
  }
  const auto paths = options.paths;
  {
    AlignedBuffer source(8 * kMib), target(8 * kMib);  // mapped until the engine has closed
    Engine engine(options);
    engine.register_buffer(source.address(), source.nbytes());
    auto* bytes = static_cast<unsigned char*>(source.address());
    for (std::size_t i = 0; i < source.nbytes(); ++i) bytes[i] = static_cast<unsigned char>(i * 2654435761u >> 13);
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        char* from = static_cast<char*>(source.address()) + t * 2 * kMib;
        char* to = static_cast<char*>(target.address()) + t * 2 * kMib;
        expect(wait(engine.submit(Op::write, from, 2 * kMib, t * 2 * kMib)), "a write completes");
        expect(wait(engine.submit(Op::read, to, 2 * kMib, t * 2 * kMib, true)), "a read completes");
      });
    for (std::thread& thread : threads) thread.join();
    expect(std::memcmp(source.address(), target.address(), 8 * kMib) == 0, "reads return what was written");
    auto dropped = engine.submit(Op::read, target.address(), 8 * kMib, 0);
    dropped.reset();  // nobody waits; the engine closes with it in flight
  }
  for (const std::string& path : paths) ::unlink(path.c_str());
}

void cancelling(const std::string& backend) {
  EngineOptions options;
  options.paths = {make_file("drive-d")};
  options.backend = backend;
  options.block_nbytes = 4096;
  options.queue_depth = 2;
  options.faults = std::make_shared<Faults>();
  options.faults->delay_ms = 1;
  {
    AlignedBuffer buffer(8 * kMib);
    Engine engine(options);
    std::vector<std::shared_ptr<Ticket>> tickets;
    for (std::size_t t = 0; t < 4; ++t)
      tickets.push_back(engine.submit(Op::write, static_cast<char*>(buffer.address()) + t * kMib, kMib, t * kMib));
    std::thread other([&] { tickets[0]->wait_for(std::chrono::milliseconds(20)); });
    std::thread stopper([&] { engine.cancel(); });
    other.join();
    stopper.join();
    for (const auto& ticket : tickets) expect(wait(ticket), "a cancelled ticket completes");
    expect(tickets[3]->error().code != 0, "what was queued is cancelled");
    engine.close();
  }
  ::unlink(options.paths[0].c_str());
}

// Registering goes through the thread that owns the ring, while it transfers, while others register, and after it
// ended.
void registers_beside_transfers(const std::string& backend) {
  EngineOptions options;
  options.paths = {make_file("drive-d")};
  options.backend = backend;
  options.block_nbytes = 64 << 10;
  options.queue_depth = 32;
  {
    std::vector<std::unique_ptr<AlignedBuffer>> targets;  // mapped until the engine has closed
    for (std::size_t t = 0; t < 4; ++t) targets.push_back(std::make_unique<AlignedBuffer>(kMib));
    Engine engine(options);
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        AlignedBuffer source(kMib), &target = *targets[t];
        std::memset(source.address(), static_cast<int>(t + 1), kMib);
        expect(wait(engine.submit(Op::write, source.address(), kMib, t * kMib)), "an unregistered write completes");
        const bool registered = engine.register_buffer(target.address(), kMib);
        expect(registered == (backend == "uring"), "io_uring registers, the other backend says that it does not");
        expect(wait(engine.submit(Op::read, target.address(), kMib, t * kMib)), "a registered read completes");
        expect(std::memcmp(source.address(), target.address(), kMib) == 0,
               "a registered read returns what was written");
      });
    for (std::thread& thread : threads) thread.join();
    engine.close();
    AlignedBuffer late(kMib);
    expect(!engine.register_buffer(late.address(), kMib), "a closed engine registers nothing");
  }
  ::unlink(options.paths[0].c_str());
}

void errors(const std::string& backend) {
  EngineOptions options;
  options.paths = {make_file("drive-c")};
  options.backend = backend;
  options.faults = std::make_shared<Faults>();
  options.faults->fail_nth = 3;
  {
    AlignedBuffer buffer(8 * kMib);
    Engine engine(options);
    auto ticket = engine.submit(Op::write, buffer.address(), 8 * kMib, 0);
    expect(wait(ticket) && ticket->error().code == 5, "a failing block fails its ticket");
    engine.close();
    ticket = engine.submit(Op::write, buffer.address(), kMib, 0);
    expect(wait(ticket) && ticket->error().code != 0, "a closed engine refuses");
  }
  ::unlink(options.paths[0].c_str());
}

// A transfer that a gate has let through is the engine's like any other: whoever gives the engine up waits for it. Were
// the engine kept alive for it instead, it might go on its own thread, which cannot wait for itself.
void an_engine_that_is_gone_has_no_transfers(const std::string& backend) {
  EngineOptions options;
  options.paths = {make_file("drive-e")};
  options.backend = backend;
  options.faults = std::make_shared<Faults>();
  options.faults->power_loss_nth = ~std::uint64_t{0};  // never; but the lock is taken on the way to a transfer
  {
    AlignedBuffer buffer(kMib);
    auto engine = std::make_shared<Engine>(options);
    const auto gate = std::make_shared<Ticket>(1);
    const auto gated = engine->submit_after(gate, Op::write, buffer.address(), kMib, 0);
    std::unique_lock<std::mutex> held(options.faults->mutex);
    std::thread opener([&] { gate->settle_piece({}); });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // it is on its way now, and stopped there
    std::atomic<bool> gone{false};
    std::thread owner([&] {
      engine.reset();
      gone = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    expect(!gone, "an engine that is gone has no transfers");
    held.unlock();
    opener.join();
    owner.join();
    expect(wait(gated) && gated->error().code == 0, "a transfer on its way is made before the engine goes");
    const auto other = std::make_shared<Ticket>(1);
    engine = std::make_shared<Engine>(options);
    const auto late = engine->submit_after(other, Op::write, buffer.address(), kMib, 0);
    engine.reset();
    other->settle_piece({});
    expect(late->done() && late->error().code == ECANCELED, "a gate that opens later starts nothing");
  }
  ::unlink(options.paths[0].c_str());
}

}  // namespace

int main() {
  std::vector<std::string> backends{"posix"};
  try {
    EngineOptions options;
    options.paths = {make_file("probe")};
    options.backend = "uring";
    { Engine probe(options); }
    ::unlink(options.paths[0].c_str());
    backends.push_back("uring");
  } catch (const std::exception& error) {
    std::printf("io_uring is not available: %s\n", error.what());
  }
  for (const std::string& backend : backends) {
    round_trips(backend, 0);
    round_trips(backend, 3);
    registers_beside_transfers(backend);
    errors(backend);
    cancelling(backend);
    an_engine_that_is_gone_has_no_transfers(backend);
  }
  return failures == 0 ? 0 : 1;
}
