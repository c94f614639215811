// The rules: one loop over whole vectors each, for the compiler: every plane a restricted argument, every scalar a copy
// (a float store might else change it), no branch. The benchmark compares their rates with torch's; a loop that is no
// longer vectorised shows there, by a factor of five. Included by kernels_body.h.
//
// Order of operations follows torch's single tensor paths. The moments have the bits of torch where torch does not fuse
// either (with AVX2 and AVX-512 it fuses lerp, addcmul and add(alpha)); the parameter too, but for torch's CPU square
// root, which is not correctly rounded. Ours is.

constexpr std::size_t kMomentsMax = 2;

// Moments that a rule does not have are null.
using RuleLoop = void (*)(const Planes&, float* first, float* second, std::size_t n, const Scalars&);

// torch.optim.AdamW and Adam: decay, lerp, addcmul, addcdiv.
template <typename Param, typename Grad, bool has_l2, bool lerp_from_grad>
OFFLOAD_TARGET __attribute__((noinline)) void adamw_loop(Param* __restrict__ param, std::int16_t* __restrict__ lo,
                                                         float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                                                         const Grad* __restrict__ grad, std::size_t n,
                                                         const Scalars s) {
  for (std::size_t i = 0; i < n; ++i) {
    float p = load_master(param, lo, i);
    float g = load_grad(grad, i, s.grad_scale);
    if constexpr (has_l2) g = g + s.l2 * p;
    p = p * s.decay;
    const float before = exp_avg[i];
    const float m = (lerp_from_grad ? g : before) + s.lerp_weight * (g - before);
    const float v = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * g * g;
    const float denominator = __builtin_sqrtf(v) / s.bias_correction2_sqrt + s.eps;
    p = p + s.negative_step_size * m / denominator;
    exp_avg[i] = float_of(canonical(bits_of(m)));
    exp_avg_sq[i] = float_of(canonical(bits_of(v)));
    store_master(param, lo, i, p);
  }
}

// torch.optim.SGD: L2, momentum (the first gradient as it is), nesterov.
template <typename Param, typename Grad, bool has_l2, bool has_momentum, bool is_first, bool nesterov>
OFFLOAD_TARGET __attribute__((noinline)) void sgd_loop(Param* __restrict__ param, std::int16_t* __restrict__ lo,
                                                       float* __restrict__ momentum, const Grad* __restrict__ grad,
                                                       std::size_t n, const Scalars s) {
  for (std::size_t i = 0; i < n; ++i) {
    float p = load_master(param, lo, i);
    float g = load_grad(grad, i, s.grad_scale);
    if constexpr (has_l2) g = g + s.l2 * p;
    if constexpr (has_momentum) {
      const float b = is_first ? g : momentum[i] * s.momentum + s.one_minus_dampening * g;
      momentum[i] = float_of(canonical(bits_of(b)));
      g = nesterov ? g + s.momentum * b : b;
    }
    p = p + s.negative_step_size * g;
    store_master(param, lo, i, p);
  }
}

// Lion (Chen et al. 2023, arXiv 2302.06675, program 1). The sign of zero is zero, that of a NaN a NaN.
template <typename Param, typename Grad>
OFFLOAD_TARGET __attribute__((noinline)) void lion_loop(Param* __restrict__ param, std::int16_t* __restrict__ lo,
                                                        float* __restrict__ exp_avg, const Grad* __restrict__ grad,
                                                        std::size_t n, const Scalars s) {
  for (std::size_t i = 0; i < n; ++i) {
    const float g = load_grad(grad, i, s.grad_scale);
    const float m = exp_avg[i];
    const float c = m * s.beta1 + s.one_minus_beta1 * g;
    const float below = c < 0.0f ? -1.0f : c;
    const float sign = c > 0.0f ? 1.0f : below;
    const float p = load_master(param, lo, i) * s.decay + s.negative_step_size * sign;
    exp_avg[i] = float_of(canonical(bits_of(m * s.beta2 + s.one_minus_beta2 * g)));
    store_master(param, lo, i, p);
  }
}

template <typename Param, typename Grad, bool has_l2, bool lerp_from_grad>
OFFLOAD_TARGET void adamw(const Planes& planes, float* first, float* second, std::size_t n, const Scalars& s) {
  adamw_loop<Param, Grad, has_l2, lerp_from_grad>(static_cast<Param*>(planes.param), planes.lo, first, second,
                                                  static_cast<const Grad*>(planes.grad), n, s);
}

template <typename Param, typename Grad, bool has_l2, bool has_momentum, bool is_first, bool nesterov>
OFFLOAD_TARGET void sgd(const Planes& planes, float* first, float*, std::size_t n, const Scalars& s) {
  sgd_loop<Param, Grad, has_l2, has_momentum, is_first, nesterov>(static_cast<Param*>(planes.param), planes.lo, first,
                                                                  static_cast<const Grad*>(planes.grad), n, s);
}

template <typename Param, typename Grad>
OFFLOAD_TARGET void lion(const Planes& planes, float* first, float*, std::size_t n, const Scalars& s) {
  lion_loop(static_cast<Param*>(planes.param), planes.lo, first, static_cast<const Grad*>(planes.grad), n, s);
}

template <typename Param, typename Grad, bool has_l2>
OFFLOAD_TARGET RuleLoop sgd_of(const Scalars& s) {
  if (!s.has_momentum) return &sgd<Param, Grad, has_l2, false, false, false>;
  if (s.is_first)
    return s.nesterov ? &sgd<Param, Grad, has_l2, true, true, true> : &sgd<Param, Grad, has_l2, true, true, false>;
  return s.nesterov ? &sgd<Param, Grad, has_l2, true, false, true> : &sgd<Param, Grad, has_l2, true, false, false>;
}

template <typename Param, typename Grad, bool has_l2>
OFFLOAD_TARGET RuleLoop adamw_of(const Scalars& s) {
  return s.lerp_from_grad ? &adamw<Param, Grad, has_l2, true> : &adamw<Param, Grad, has_l2, false>;
}

template <typename Param, typename Grad>
OFFLOAD_TARGET RuleLoop loop_of(Rule rule, const Scalars& s) {
  if (rule == Rule::lion) return &lion<Param, Grad>;
  if (rule == Rule::sgd) return s.l2 != 0.0f ? sgd_of<Param, Grad, true>(s) : sgd_of<Param, Grad, false>(s);
  return s.l2 != 0.0f ? adamw_of<Param, Grad, true>(s) : adamw_of<Param, Grad, false>(s);
}
