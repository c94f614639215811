// Which kernels this processor can run; libgcc's check includes the operating system's XCR0.
#include <cmath>
#include <stdexcept>

#include "optim/kernels.h"

namespace offload::optim {

namespace level_scalar {
Kernels table();
}
#if defined(__x86_64__)
namespace level_avx2 {
Kernels table();
}
namespace level_avx512 {
Kernels table();
}
#endif

const std::vector<Kernels>& kernels() {
  static const std::vector<Kernels> available = [] {
    std::vector<Kernels> list{level_scalar::table()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) list.push_back(level_avx2::table());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      list.push_back(level_avx512::table());
#endif
    return list;
  }();
  return available;
}

const Kernels& kernels_at(const std::string& level) {
  if (level == "auto") return kernels().back();
  for (const Kernels& entry : kernels())
    if (entry.level == level) return entry;
  throw std::invalid_argument("instruction set " + level + " is not available here");
}

namespace {

// One step of splitmix64, as a function of its counter.
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

Scalars scalars_of(Rule rule, const Hyper& hyper) {
  const double bias_correction1 = 1.0 - std::pow(hyper.beta1, static_cast<double>(hyper.step));
  const double bias_correction2 = 1.0 - std::pow(hyper.beta2, static_cast<double>(hyper.step));
  const bool decoupled = rule == Rule::lion || (rule == Rule::adamw && hyper.decoupled);
  Scalars s{};
  s.decay = static_cast<float>(decoupled ? 1.0 - hyper.lr * hyper.weight_decay : 1.0);
  s.l2 = static_cast<float>(decoupled ? 0.0 : hyper.weight_decay);
  const float weight = static_cast<float>(1.0 - hyper.beta1);
  s.lerp_from_grad = weight >= 0.5f;
  s.lerp_weight = s.lerp_from_grad ? weight - 1.0f : weight;
  s.beta1 = static_cast<float>(hyper.beta1);
  s.one_minus_beta1 = weight;
  s.beta2 = static_cast<float>(hyper.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - hyper.beta2);
  s.eps = static_cast<float>(hyper.eps);
  s.bias_correction2_sqrt = static_cast<float>(std::sqrt(bias_correction2));
  s.negative_step_size = static_cast<float>(rule == Rule::adamw ? -hyper.lr / bias_correction1 : -hyper.lr);
  s.grad_scale = static_cast<float>(hyper.maximize ? -hyper.grad_scale : hyper.grad_scale);
  s.momentum = static_cast<float>(hyper.momentum);
  s.one_minus_dampening = static_cast<float>(1.0 - hyper.dampening);
  s.has_momentum = hyper.momentum != 0.0;
  s.is_first = hyper.step == 1;
  s.nesterov = hyper.nesterov;
  const std::uint64_t key = mixed(mixed(hyper.noise_seed) + static_cast<std::uint64_t>(hyper.step));
  s.noise_keys[0] = static_cast<std::uint32_t>(key);
  s.noise_keys[1] = static_cast<std::uint32_t>(key >> 32);
  s.noise_origin = static_cast<std::uint32_t>(hyper.noise_origin);
  return s;
}

}  // namespace offload::optim
