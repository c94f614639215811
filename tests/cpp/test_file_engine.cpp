// Transfers of any file at any alignment under sanitizers: both backends, many threads, ragged ends, errors, close.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "checks.h"
#include "common/aligned_buffer.h"
#include "io/file_engine.h"

using namespace offload;
using namespace offload::io;

namespace {

std::string new_path() {
  std::string path = "file.XXXXXX";
  const int descriptor = ::mkstemp(path.data());
  if (descriptor < 0) std::abort();
  ::close(descriptor);
  return path;
}

FileEngineOptions small(const std::string& backend, std::uint64_t short_every) {
  FileEngineOptions options;
  options.backend = backend;
  options.block_nbytes = 1024;
  options.queue_depth = 3;
  if (short_every == 0) return options;
  options.faults = std::make_shared<Faults>();
  options.faults->short_every = short_every;
  options.faults->short_nbytes = 700;
  return options;
}

void round_trips(const std::string& backend, std::uint64_t short_every) {
  FileEngine engine(small(backend, short_every));
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 4; ++t)
    threads.emplace_back([&engine, t] {
      const AlignedBuffer source(16384), target(16384);
      auto* from = static_cast<unsigned char*>(source.address());
      auto* into = static_cast<unsigned char*>(target.address());
      for (std::size_t i = 0; i < source.nbytes(); ++i) from[i] = static_cast<unsigned char>(i * 31 + t);
      const std::string path = new_path();
      for (const std::size_t nbytes : {std::size_t{1}, std::size_t{512}, std::size_t{4096}, std::size_t{9000}})
        for (const std::size_t shift : {std::size_t{0}, std::size_t{512}, std::size_t{3}}) {
          const auto written = engine.submit(Op::write, path, from + shift, nbytes, shift);
          expect(wait(written) && written->error().code == 0, "a write completes");
          std::memset(into, 0, target.nbytes());
          const int descriptor = ::open(path.c_str(), O_RDONLY | (shift == 512 ? O_DIRECT : 0));
          const auto read = engine.submit(Op::read, descriptor, into + shift, nbytes, shift);
          ::close(descriptor);
          expect(wait(read) && read->error().code == 0, "a read completes");
          expect(std::memcmp(into + shift, from + shift, nbytes) == 0, "what was written is read");
        }
      ::unlink(path.c_str());
    });
  for (std::thread& thread : threads) thread.join();
}

void errors(const std::string& backend) {
  FileEngine engine(small(backend, 0));
  const AlignedBuffer buffer(4096);
  const std::string path = new_path();
  int raised = 0;
  try {
    engine.submit(Op::read, "no such file", buffer.address(), 4096, 0);
  } catch (const std::system_error& error) {
    raised += error.code().value() == ENOENT;
  }
  try {
    engine.submit(Op::read, path, buffer.address(), 4096, 0);
  } catch (const std::system_error& error) {
    raised += error.code().value() == EIO;
  }
  expect(raised == 2, "a file that is missing or too short is refused");
  const auto nothing = engine.submit(Op::write, path, buffer.address(), 0, 0);
  expect(wait(nothing) && nothing->error().code == 0, "no bytes are a transfer too");
  const auto last = engine.submit(Op::write, path, buffer.address(), 4096, 0);
  engine.close();
  expect(wait(last) && last->error().code == 0, "close finishes what is in flight");
  const auto late = engine.submit(Op::write, path, buffer.address(), 4096, 0);
  expect(wait(late) && late->error().code == ECANCELED, "nothing starts after close");
  ::unlink(path.c_str());
}

}  // namespace

int main() {
  std::vector<std::string> backends{"posix"};
  try {
    const FileEngine probe(small("uring", 0));
    backends.push_back("uring");
  } catch (const std::exception& error) {
    std::printf("io_uring is not available: %s\n", error.what());
  }
  for (const std::string& backend : backends) {
    round_trips(backend, 0);
    round_trips(backend, 3);
    errors(backend);
  }
  return failures == 0 ? 0 : 1;
}
