// The kernels for the instruction set "scalar".
#include "optim/kernels.h"

#if 1

#define OFFLOAD_TARGET __attribute__((optimize("no-tree-vectorize")))

namespace offload::optim::level_scalar {

namespace {
#include "optim/kernels_body.h"
}  // namespace

Kernels table() { return {"scalar", &update, &split, &merge, &canonicalize_nan}; }

}  // namespace offload::optim::level_scalar

#endif
