// The engine: one logical address space over 1..N files, cut into stripes and I/O blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "io/backend.h"

namespace offload::io {

struct EngineOptions {
  std::vector<std::string> paths;
  std::string backend = "auto";
  bool direct = true;
  std::size_t block_nbytes = std::size_t{1} << 20;
  unsigned queue_depth = 32;
  std::size_t stripe_nbytes = std::size_t{1} << 20;
  std::shared_ptr<Faults> faults;
};

class Engine {
 public:
  explicit Engine(EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Starts one transfer; never blocks on the device. With O_DIRECT all three numbers are multiples of 4096. Throws
  // std::system_error in a forked process, where nobody would ever complete it; so do the others that wait.
  std::shared_ptr<Ticket> submit(Op op, void* address, std::size_t nbytes, std::uint64_t offset, bool urgent = false);
  // The same, started when `gate` has completed; its error becomes this ticket's. Fails when the engine is gone by
  // then; one that has started holds the engine's destructor up, as every transfer does.
  std::shared_ptr<Ticket> submit_after(const std::shared_ptr<Ticket>& gate, Op op, void* address, std::size_t nbytes,
                                       std::uint64_t offset, bool urgent = false);
  // False when the kernel refuses; transfers then go unregistered. The memory must stay mapped until close(): the
  // kernel keeps its pages, so another mapping at the same address would be transferred from and to the old ones.
  bool register_buffer(void* address, std::size_t nbytes);
  // Returns when everything that has been written so far is on the drives (fdatasync, of all drives at the same time).
  // Throws std::system_error, which names the file, once all have ended.
  void sync();
  // Gives up what the kernel has not been given yet: those tickets, and all later ones, fail with ECANCELED. For the
  // end of a run that was stopped; close() then waits for little.
  void cancel();
  // Goes on with other files of the same number, in the place of its own. Nothing may be in flight, and nobody may call
  // anything else meanwhile. Buffers stay registered, counters go on. Throws, and changes nothing, when one cannot be
  // opened.
  void reopen(std::vector<std::string> paths);
  // Finishes what is in flight and releases registered buffers. Any thread, any number of times.
  void close();

  // True in a process that was forked from the engine's: threads and transfers are the parent's.
  bool inherited() const;

  const std::string& backend() const { return backend_name_; }
  const std::string& backend_reason() const { return backend_reason_; }
  bool direct() const { return direct_; }
  std::size_t n_drives() const { return backends_.size(); }
  const std::string& path(std::size_t drive) const { return options_.paths[drive]; }
  const Counters& counters(std::size_t drive) const { return backends_[drive]->counters(); }

 private:
  // Through which what waits for a gate finds the engine, or that there is none any more. Nothing but the engine's
  // owners keeps it alive: it must not go on one of its own threads.
  struct Door {
    std::mutex mutex;
    Engine* engine;  // null: gone
  };
  static void check_transfer(const void* address, std::size_t nbytes, std::uint64_t offset);
  void open_files();
  void make_backends();
  void close_files();

  EngineOptions options_;
  std::string backend_name_, backend_reason_;
  bool direct_ = true;
  const int owner_pid_;
  const std::shared_ptr<Door> door_ = std::make_shared<Door>();
  std::mutex close_mutex_;
  bool closed_ = false;
  struct File {
    int descriptor;
    bool direct;
  };
  std::vector<File> files_;
  std::vector<std::unique_ptr<Backend>> backends_;
  std::vector<std::pair<char*, std::size_t>> registered_;
};

}  // namespace offload::io
