// Binding entry points, one per room of the extension.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

void bind_io(pybind11::module_& module);
void bind_optim(pybind11::module_& module);

}  // namespace offload
