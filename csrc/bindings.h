// What the bindings share, and their entry points, one per room of the extension.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// The GIL is free while one lives. Unlike pybind11's, whose destructor would end the process, it lets Python unwind a
// daemon thread that comes back when the interpreter has begun to end (it does so before Python 3.14).
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() noexcept(false) { PyEval_RestoreThread(state_); }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* const state_;
};

void bind_io(pybind11::module_& module);
void bind_optim(pybind11::module_& module);

}  // namespace offload
