// Page-aligned anonymous memory of an exact size, returned on destruction.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <system_error>

namespace offload {

constexpr std::size_t kPageNbytes = 4096;

class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t nbytes) : nbytes_((nbytes + kPageNbytes - 1) / kPageNbytes * kPageNbytes) {
    if (nbytes_ == 0) nbytes_ = kPageNbytes;
    address_ = ::mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address_ == MAP_FAILED)
      throw std::system_error(errno, std::generic_category(), "mmap of an arena failed: lower host_memory");
  }
  ~AlignedBuffer() { ::munmap(address_, nbytes_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  void* address() const { return address_; }
  std::size_t nbytes() const { return nbytes_; }

 private:
  void* address_ = nullptr;
  std::size_t nbytes_ = 0;
};

}  // namespace offload
