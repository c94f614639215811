#include "io/engine.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <system_error>
#include <utility>
#include <vector>

#include "common/aligned_buffer.h"
#include "common/check.h"
#include "common/forked.h"

namespace offload::io {

Engine::Engine(EngineOptions options) : options_(std::move(options)), direct_(options_.direct), owner_pid_(::getpid()) {
  OFFLOAD_CHECK(!options_.paths.empty(), "an engine needs at least one file");
  OFFLOAD_CHECK(options_.block_nbytes >= kPageNbytes && options_.block_nbytes % kPageNbytes == 0,
                "block_nbytes must be a positive multiple of 4096");
  OFFLOAD_CHECK(options_.block_nbytes <= (std::size_t{1} << 30), "block_nbytes must not exceed 1 GiB");
  OFFLOAD_CHECK(options_.stripe_nbytes >= kPageNbytes && options_.stripe_nbytes % kPageNbytes == 0,
                "stripe_nbytes must be a positive multiple of 4096");
  OFFLOAD_CHECK(options_.queue_depth >= 1 && options_.queue_depth <= 4096, "queue_depth must be 1 to 4096");
  OFFLOAD_CHECK(options_.backend == "auto" || options_.backend == "uring" || options_.backend == "posix",
                "backend must be auto, uring or posix");
  try {
    open_files();
    make_backends();
  } catch (...) {
    backends_.clear();
    close_files();
    throw;
  }
  door_->engine = this;
}

void Engine::make_backends() {
  for (std::size_t drive = 0; drive < files_.size(); ++drive) {
    BackendOptions backend_options{options_.paths[drive], files_[drive].descriptor, files_[drive].direct,
                                   options_.queue_depth, options_.faults};
    std::unique_ptr<Backend> backend;
    if (options_.backend != "posix" && backend_name_ != "posix")
      backend = make_uring_backend(backend_options, backend_reason_);
    if (backend) {
      backend_name_ = "uring";
    } else {
      if (options_.backend == "uring")
        throw std::system_error(ENOSYS, std::generic_category(), "backend=uring refused: " + backend_reason_);
      backend = make_posix_backend(backend_options);
      backend_name_ = "posix";
    }
    backends_.push_back(std::move(backend));
  }
}

Engine::~Engine() {
  {
    std::lock_guard<std::mutex> lock(door_->mutex);
    door_->engine = nullptr;
  }
  close();
}

void Engine::open_files() {
  for (const std::string& path : options_.paths) {
    bool direct = options_.direct;
    int descriptor = -1;
    if (direct) {
      descriptor = ::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
      if (descriptor < 0 && errno == EINVAL) direct = false;  // tmpfs and some network file systems
      // Sectors larger than what transfers are aligned to: each would be refused.
      if (descriptor >= 0 && direct_alignment(descriptor) > kPageNbytes) {
        ::close(descriptor);
        direct = false;
      }
    }
    if (!direct) descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor < 0) throw std::system_error(errno, std::generic_category(), "cannot open " + path);
    files_.push_back({descriptor, direct});
    direct_ = direct_ && direct;
  }
}

void Engine::close_files() {
  for (const File& file : files_) ::close(file.descriptor);
  files_.clear();
}

void Engine::check_transfer(const void* address, std::size_t nbytes, std::uint64_t offset) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(address) % kPageNbytes == 0 && nbytes % kPageNbytes == 0 &&
                       offset % kPageNbytes == 0;
  OFFLOAD_CHECK(aligned, "address, nbytes and offset must be multiples of 4096");
  OFFLOAD_CHECK(nbytes > 0 && address != nullptr, "a transfer needs an address and at least one page");
}

std::shared_ptr<Ticket> Engine::submit_after(const std::shared_ptr<Ticket>& gate, Op op, void* address,
                                             std::size_t nbytes, std::uint64_t offset, bool urgent) {
  check_transfer(address, nbytes, offset);
  refuse_forked(owner_pid_);
  auto ticket = std::make_shared<Ticket>(1);
  gate->on_complete([door = door_, ticket, op, address, nbytes, offset, urgent](const Error& error) {
    std::shared_ptr<Ticket> started;
    Error refused = error;
    if (refused.code == 0) {
      std::lock_guard<std::mutex> lock(door->mutex);
      try {
        if (door->engine == nullptr)
          refused = {ECANCELED, "the engine is closed"};
        else
          started = door->engine->submit(op, address, nbytes, offset, urgent);
      } catch (const std::exception& thrown) {  // out of memory: nobody may be left waiting
        refused = {ENOMEM, thrown.what()};
      }
    }
    if (started)
      started->on_complete([ticket](const Error& late) { ticket->settle_piece(late); });
    else
      ticket->settle_piece(refused);
  });
  return ticket;
}

std::shared_ptr<Ticket> Engine::submit(Op op, void* address, std::size_t nbytes, std::uint64_t offset, bool urgent) {
  check_transfer(address, nbytes, offset);
  refuse_forked(owner_pid_);
  const std::size_t n_drives = backends_.size();
  std::vector<std::vector<Piece>> pieces(n_drives);
  std::size_t n_pieces = 0;
  for (std::size_t moved = 0; moved < nbytes;) {
    const std::uint64_t at = offset + moved;
    std::size_t length = std::min(options_.block_nbytes, nbytes - moved);
    std::size_t drive = 0;
    std::uint64_t file_offset = at;
    if (n_drives > 1) {
      const std::uint64_t stripe = at / options_.stripe_nbytes;
      const std::uint64_t within = at % options_.stripe_nbytes;
      drive = static_cast<std::size_t>(stripe % n_drives);
      file_offset = stripe / n_drives * options_.stripe_nbytes + within;
      length = std::min(length, static_cast<std::size_t>(options_.stripe_nbytes - within));
    }
    pieces[drive].push_back({op, static_cast<char*>(address) + moved, length, file_offset, nullptr, urgent});
    ++n_pieces;
    moved += length;
  }
  auto ticket = std::make_shared<Ticket>(n_pieces);
  for (std::size_t drive = 0; drive < n_drives; ++drive) {
    if (pieces[drive].empty()) continue;
    for (Piece& piece : pieces[drive]) piece.ticket = ticket;
    if (options_.faults)
      for (const Piece& piece : pieces[drive]) backends_[drive]->remember(piece);
    backends_[drive]->submit(std::move(pieces[drive]));
  }
  return ticket;
}

bool Engine::register_buffer(void* address, std::size_t nbytes) {
  refuse_forked(owner_pid_);
  std::lock_guard<std::mutex> lock(close_mutex_);  // reopen() goes through what is registered, with other backends
  bool all = true;
  registered_.emplace_back(static_cast<char*>(address), nbytes);
  for (const auto& backend : backends_) all = backend->register_buffer(static_cast<char*>(address), nbytes) && all;
  return all;
}

void Engine::reopen(std::vector<std::string> paths) {
  refuse_forked(owner_pid_);
  std::lock_guard<std::mutex> lock(close_mutex_);
  OFFLOAD_CHECK(!closed_, "the engine is closed");
  OFFLOAD_CHECK(paths.size() == files_.size(), "an engine goes on with as many files as it has");
  auto old_paths = std::exchange(options_.paths, std::move(paths));
  auto old_files = std::exchange(files_, {});
  auto old_backends = std::exchange(backends_, {});
  try {
    open_files();
    make_backends();
  } catch (...) {
    backends_ = std::move(old_backends);
    close_files();
    files_ = std::move(old_files);
    options_.paths = std::move(old_paths);
    throw;
  }
  for (std::size_t drive = 0; drive < backends_.size(); ++drive) {
    old_backends[drive]->close();  // first: both at once would lock twice the memory, which a limit may not allow
    ::close(old_files[drive].descriptor);
    for (const auto& [address, nbytes] : registered_) backends_[drive]->register_buffer(address, nbytes);
    backends_[drive]->go_on_counting(*old_backends[drive]);
  }
  if (!options_.faults) return;
  std::lock_guard<std::mutex> faults_lock(options_.faults->mutex);
  options_.faults->unsynced.clear();  // of files that are not ours any more
}

void Engine::sync() {
  refuse_forked(owner_pid_);
  std::lock_guard<std::mutex> lock(close_mutex_);
  if (closed_) throw std::system_error(ECANCELED, std::generic_category(), "the engine is closed");
  const auto one_by_one = std::launch::deferred;  // also where the system has no room for another thread
  const auto how = files_.size() > 1 ? std::launch::async | one_by_one : one_by_one;
  std::vector<std::future<int>> flushes;
  for (const File& file : files_)
    flushes.push_back(std::async(how, [&file] { return ::fdatasync(file.descriptor) == 0 ? 0 : errno; }));
  std::vector<int> codes;
  for (std::future<int>& flush : flushes) codes.push_back(flush.get());
  for (std::size_t drive = 0; drive < codes.size(); ++drive) {
    if (codes[drive] != 0)
      throw std::system_error(codes[drive], std::generic_category(), "fdatasync of " + options_.paths[drive]);
    if (options_.faults) backends_[drive]->synced();
  }
}

void Engine::cancel() {
  if (inherited()) return;
  for (const auto& backend : backends_) backend->cancel();
}

bool Engine::inherited() const { return ::getpid() != owner_pid_; }

void Engine::close() {
  if (inherited()) return;
  std::lock_guard<std::mutex> lock(close_mutex_);
  if (closed_) return;
  closed_ = true;
  for (const auto& backend : backends_) backend->close();
  close_files();
}

}  // namespace offload::io
