// Several drives are flushed at the same time, and a flush that fails is told when all have ended.
//
// `fdatasync` and `pthread_create` below stand in for the system's in this program: the engine under test calls them.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "checks.h"
#include "io/engine.h"

using namespace offload::io;

namespace {

std::mutex mutex;
std::condition_variable changed;
std::size_t wanted = 0;  // flushes that have to be under way before any of them returns
std::size_t under_way = 0, ended = 0;
std::size_t fails = 0;  // which of them, from 1 on in the order of descriptors; 0: none
bool met = true;
std::set<int> descriptors;         // that have been flushed
std::atomic<bool> no_room{false};  // for another thread

void expect_flushes(std::size_t n, std::size_t which_fails) {
  std::lock_guard<std::mutex> lock(mutex);
  wanted = n, fails = which_fails, under_way = ended = 0, met = true;
  descriptors.clear();
}

std::vector<std::string> make_files(std::size_t n) {
  std::vector<std::string> paths;
  for (std::size_t i = 0; i < n; ++i) {
    std::string path = "drive.XXXXXX";
    const int descriptor = ::mkstemp(path.data());
    if (descriptor < 0 || ::ftruncate(descriptor, 1 << 20) != 0) std::abort();
    ::close(descriptor);
    paths.push_back(path);
  }
  return paths;
}

void flushes(std::size_t n_drives) {
  EngineOptions options;
  options.paths = make_files(n_drives);
  options.backend = "posix";
  {
    Engine engine(options);
    expect_flushes(n_drives, 0);
    engine.sync();
    expect(met, "all drives are being flushed before the first has been");
    expect(ended == n_drives && descriptors.size() == n_drives, "every drive has been flushed when sync returns");
    for (std::size_t which = 1; which <= n_drives; ++which) {
      expect_flushes(n_drives, which);
      std::string told;
      try {
        engine.sync();
      } catch (const std::system_error& error) {
        expect(error.code().value() == EIO, "a flush that fails is told with its error");
        told = error.what();
      }
      expect(ended == n_drives, "the others have ended when it is told");
      expect(told.find("fdatasync of " + options.paths[which - 1]) != std::string::npos, "it is told with its file");
    }
    engine.close();
    try {
      engine.sync();
      expect(false, "a closed engine refuses to flush");
    } catch (const std::system_error& error) {
      expect(error.code().value() == ECANCELED, "a closed engine says so");
    }
  }
  for (const std::string& path : options.paths) ::unlink(path.c_str());
}

void flushes_where_no_thread_can_be_had(std::size_t n_drives) {
  EngineOptions options;
  options.paths = make_files(n_drives);
  options.backend = "posix";
  {
    Engine engine(options);
    expect_flushes(1, 0);
    no_room = true;
    try {
      engine.sync();
    } catch (const std::system_error&) {
      expect(false, "drives are flushed one after the other where no thread can be had");
    }
    no_room = false;
    expect(ended == n_drives && descriptors.size() == n_drives, "every drive has been flushed then too");
  }
  for (const std::string& path : options.paths) ::unlink(path.c_str());
}

}  // namespace

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* with) {
  if (no_room) return EAGAIN;
  static const auto create = reinterpret_cast<decltype(&pthread_create)>(::dlsym(RTLD_NEXT, "pthread_create"));
  return create(thread, attributes, run, with);
}

extern "C" int fdatasync(int descriptor) {
  std::unique_lock<std::mutex> lock(mutex);
  ++under_way;
  descriptors.insert(descriptor);
  changed.notify_all();
  // One after the other, the first would wait for ever.
  if (!changed.wait_for(lock, std::chrono::seconds(20), [] { return under_way >= wanted; })) met = false;
  ++ended;
  auto failing = descriptors.begin();
  if (fails > 0 && fails <= descriptors.size()) std::advance(failing, fails - 1);
  if (fails == 0 || *failing != descriptor) return 0;
  errno = EIO;
  return -1;
}

int main() {
  flushes(1);
  flushes(3);
  flushes_where_no_thread_can_be_had(3);
  return failures == 0 ? 0 : 1;
}
