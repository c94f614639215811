// Update rules over fp32 masters that are stored as planes; one arithmetic, compiled for several instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "optim/record.h"

namespace offload::optim {

enum class GradDtype { float32, bfloat16 };

// callback: not a kernel; the job brings a function that updates a piece of a chunk.
enum class Rule { adamw, sgd, lion, callback };

// Hyperparameters of every rule; each reads its own.
struct Hyper {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0;
  std::int64_t step = 1;  // 1 for the first update
  bool decoupled = true;  // AdamW; false: Adam with L2
  double grad_scale = 1.0;
  bool maximize = false;
  double momentum = 0.0, dampening = 0.0;  // SGD
  bool nesterov = false;
  // Of the noise that rounds bf16 moments: which parameter, and the element of its flat buffer where it begins.
  std::uint64_t noise_seed = 0, noise_origin = 0;
};

// The scalars of one update, computed in double and rounded to float once.
struct Scalars {
  float decay, l2, lerp_weight, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, bias_correction2_sqrt,
      negative_step_size, grad_scale, momentum, one_minus_dampening;
  bool lerp_from_grad;  // as torch.lerp does for weights of one half and more: exact at weight 1
  bool has_momentum, is_first, nesterov;
  std::uint32_t noise_keys[2], noise_origin;
};
Scalars scalars_of(Rule rule, const Hyper& hyper);

// Planes of the same n elements. split_bf16: param is `hi` (u16), lo is int16; fp32: param is float, lo unused.
struct Planes {
  void* param;
  std::int16_t* lo;
  void* state[kStatePlanesMax];    // by the format: float, u16 (bf16), or u8 codes
  float* absmax[kStatePlanesMax];  // of quantised planes: one a block of kQuantBlock elements
  const void* grad;
  std::size_t element;  // of the flat buffer, where the planes begin
};

struct Kernels {
  std::string level;
  void (*update)(Rule, Codec, GradDtype, const StatePlanes&, const Planes&, std::size_t n, const Scalars&);
  void (*split)(const float*, std::uint16_t* hi, std::int16_t* lo, std::size_t n);
  void (*merge)(const std::uint16_t* hi, const std::int16_t* lo, float*, std::size_t n);
  void (*canonicalize_nan)(float*, std::size_t n);
  // Planes of codes, int8 or uint8, with the absmax of their blocks; as every update of such planes makes and reads
  // them.
  void (*quantise)(PlaneKind, const float*, std::uint8_t* codes, float* absmax, std::size_t n);
  void (*dequantise)(PlaneKind, const std::uint8_t* codes, const float* absmax, float*, std::size_t n);
};

// What this processor and operating system can run; scalar first, the best last.
const std::vector<Kernels>& kernels();
// By name, or the best for "auto". Throws std::invalid_argument for a level that is not available.
const Kernels& kernels_at(const std::string& level);

}  // namespace offload::optim
