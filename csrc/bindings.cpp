// The Python module `offload._C`.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "I/O engine and out-of-core optimizer of offload.";
  offload::bind_io(module);
  offload::bind_optim(module);
}
