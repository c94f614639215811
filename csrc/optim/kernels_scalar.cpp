// The kernels for every processor: on x86-64 one element at a time, elsewhere as the compiler vectorises them.
#include "optim/kernels.h"
#include "optim/quant_map.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OFFLOAD_TARGET __attribute__((optimize("no-tree-vectorize")))  // an oracle for the vector levels
#else
#define OFFLOAD_TARGET
#endif

namespace offload::optim::level_scalar {

namespace {
#include "optim/kernels_body.h"
}  // namespace

Kernels table() { return {"scalar", &update, &split, &merge, &canonicalize_nan, &quantise, &dequantise}; }

}  // namespace offload::optim::level_scalar
