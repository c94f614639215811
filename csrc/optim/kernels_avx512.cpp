// The kernels for the instruction set "avx512".
#include "optim/kernels.h"
#include "optim/quant_lines.h"
#include "optim/quant_map.h"

#if defined(__x86_64__)

// Of GCC's own header, which leaves undefined what does not matter.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define OFFLOAD_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))

namespace offload::optim::level_avx512 {

namespace {
#define OFFLOAD_HAS_VECTORS
#include "optim/vectors_avx512.h"
//
#include "optim/kernels_body.h"
}  // namespace

Kernels table() { return {"avx512", &update, &split, &merge, &canonicalize_nan, &quantise, &dequantise}; }

}  // namespace offload::optim::level_avx512

#endif
