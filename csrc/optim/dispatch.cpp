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

Scalars scalars_of(const Hyper& hyper) {
  const double bias_correction1 = 1.0 - std::pow(hyper.beta1, static_cast<double>(hyper.step));
  const double bias_correction2 = 1.0 - std::pow(hyper.beta2, static_cast<double>(hyper.step));
  Scalars s{};
  s.decay = static_cast<float>(hyper.decoupled ? 1.0 - hyper.lr * hyper.weight_decay : 1.0);
  s.l2 = static_cast<float>(hyper.decoupled ? 0.0 : hyper.weight_decay);
  const float weight = static_cast<float>(1.0 - hyper.beta1);
  s.lerp_from_grad = weight >= 0.5f;
  s.lerp_weight = s.lerp_from_grad ? weight - 1.0f : weight;
  s.beta2 = static_cast<float>(hyper.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - hyper.beta2);
  s.eps = static_cast<float>(hyper.eps);
  s.bias_correction2_sqrt = static_cast<float>(std::sqrt(bias_correction2));
  s.negative_step_size = static_cast<float>(-hyper.lr / bias_correction1);
  s.grad_scale = static_cast<float>(hyper.maximize ? -hyper.grad_scale : hyper.grad_scale);
  return s;
}

}  // namespace offload::optim
