// The kernels for the instruction set "avx512".
#include "optim/kernels.h"
#include "optim/quant_map.h"

#if defined(__x86_64__)

#define OFFLOAD_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))

namespace offload::optim::level_avx512 {

namespace {
#include "optim/kernels_body.h"
}  // namespace

Kernels table() { return {"avx512", &update, &split, &merge, &canonicalize_nan, &quantise, &dequantise}; }

}  // namespace offload::optim::level_avx512

#endif
