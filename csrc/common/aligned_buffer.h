// Page-aligned anonymous memory of an exact size, returned on destruction. A forked child finds zeros there, but for
// what is kept: pages that are registered for transfers would be copied for it, and others one by one as the parent
// writes.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <system_error>

namespace offload {

constexpr std::size_t kPageNbytes = 4096;
constexpr std::size_t kHugePageNbytes = std::size_t{2} << 20;

class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t nbytes) : nbytes_((nbytes + kPageNbytes - 1) / kPageNbytes * kPageNbytes) {
    if (nbytes_ == 0) nbytes_ = kPageNbytes;
    // From two megabytes on: start on a huge page and ask for huge pages. A transfer then has few segments.
    const std::size_t slack = nbytes_ >= kHugePageNbytes ? kHugePageNbytes : 0;
    void* mapped = ::mmap(nullptr, nbytes_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
      throw std::system_error(errno, std::generic_category(), "mmap of an arena failed: lower host_memory");
    char* const start = static_cast<char*>(mapped);
    const std::size_t over = slack == 0 ? 0 : reinterpret_cast<std::uintptr_t>(start) % kHugePageNbytes;
    const std::size_t head = over == 0 ? 0 : kHugePageNbytes - over;
    if (head != 0) ::munmap(start, head);
    if (slack - head != 0) ::munmap(start + head + nbytes_, slack - head);
    address_ = start + head;
    if (slack != 0) ::madvise(address_, nbytes_, MADV_HUGEPAGE);  // a hint: refused where huge pages are off
    ::madvise(address_, nbytes_, MADV_WIPEONFORK);
  }
  ~AlignedBuffer() { ::munmap(address_, nbytes_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // Bytes of it that a forked child is to have too, with what shares a page of the system's with them: those of some
  // kernels are larger than ours.
  void keep_on_fork(std::size_t offset, std::size_t nbytes) {
    const std::size_t before = offset % static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    ::madvise(static_cast<char*>(address_) + offset - before, before + nbytes, MADV_KEEPONFORK);
  }

  void* address() const { return address_; }
  std::size_t nbytes() const { return nbytes_; }

 private:
  void* address_ = nullptr;
  std::size_t nbytes_ = 0;
};

}  // namespace offload
