// The kernels for the instruction set "avx2".
#include "optim/kernels.h"
#include "optim/quant_lines.h"
#include "optim/quant_map.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define OFFLOAD_TARGET __attribute__((target("avx2")))

namespace offload::optim::level_avx2 {

namespace {
#define OFFLOAD_HAS_VECTORS
#include "optim/vectors_avx2.h"
//
#include "optim/kernels_body.h"
}  // namespace

Kernels table() { return {"avx2", &update, &split, &merge, &canonicalize_nan, &quantise, &dequantise}; }

}  // namespace offload::optim::level_avx2

#endif
