// The arithmetic, written once. Included inside one namespace per instruction set, with OFFLOAD_TARGET set to the
// function attributes of that set; there is no include guard on purpose. No fused multiply-add anywhere
// (-ffp-contract=off), so every instruction set gives the same bits.
//
// Order of operations follows torch.optim.AdamW (single tensor path): decay, lerp, addcmul, addcdiv. The moments have
// the bits of torch where torch does not fuse either (with AVX2 and AVX-512 it fuses lerp, addcmul and add(alpha)); the
// parameter too, but for torch's CPU square root, which is not correctly rounded. Ours is.

OFFLOAD_TARGET inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

OFFLOAD_TARGET inline float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// hi: nearest bf16, ties away from zero; lo: what is missing, modulo 2^16. A bijection on all 2^32 patterns.
OFFLOAD_TARGET inline std::uint16_t hi_of(std::uint32_t bits) {
  return static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
}
OFFLOAD_TARGET inline std::int16_t lo_of(std::uint32_t bits) { return static_cast<std::int16_t>(bits & 0xFFFFu); }
OFFLOAD_TARGET inline std::uint32_t merged(std::uint16_t hi, std::int16_t lo) {
  return (static_cast<std::uint32_t>(hi) << 16) + static_cast<std::uint32_t>(static_cast<std::int32_t>(lo));
}
// Every NaN becomes 0x7FC00000, whose hi is a NaN too. Which payload and sign a NaN carries depends on operand order
// and processor, so all results go through here.
OFFLOAD_TARGET inline std::uint32_t canonical(std::uint32_t bits) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  return (bits & ~mask) | (0x7FC00000u & mask);  // no branch, which would keep the loop from being vectorised
}

// One loop over whole vectors for the compiler: every plane a restricted argument, every scalar a copy (a float store
// might else change it), no branch. The benchmark compares its rate with torch's; a loop that is no longer vectorised
// shows there, by a factor of five.
template <typename Param, typename Grad, bool has_l2, bool lerp_from_grad>
OFFLOAD_TARGET __attribute__((noinline)) void update_planes(Param* __restrict__ param, std::int16_t* __restrict__ lo,
                                                            float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                                                            const Grad* __restrict__ grad, std::size_t n,
                                                            const Scalars s) {
  constexpr bool is_split = sizeof(Param) == 2;
  for (std::size_t i = 0; i < n; ++i) {
    float p, g;
    if constexpr (is_split)
      p = float_of(merged(param[i], lo[i]));
    else
      p = param[i];
    if constexpr (sizeof(Grad) == 2)
      g = float_of(static_cast<std::uint32_t>(grad[i]) << 16);
    else
      g = grad[i];
    g = g * s.grad_scale;
    if constexpr (has_l2) g = g + s.l2 * p;
    p = p * s.decay;
    const float before = exp_avg[i];
    const float m = (lerp_from_grad ? g : before) + s.lerp_weight * (g - before);
    const float v = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * g * g;
    const float denominator = __builtin_sqrtf(v) / s.bias_correction2_sqrt + s.eps;
    p = p + s.negative_step_size * m / denominator;
    exp_avg[i] = float_of(canonical(bits_of(m)));
    exp_avg_sq[i] = float_of(canonical(bits_of(v)));
    const std::uint32_t bits = canonical(bits_of(p));
    if constexpr (is_split) {
      param[i] = hi_of(bits);
      lo[i] = lo_of(bits);
    } else {
      param[i] = float_of(bits);
    }
  }
}

template <typename Param, typename Grad, bool has_l2>
OFFLOAD_TARGET void update_by_lerp(const Planes& planes, std::size_t n, const Scalars& s) {
  const auto call =
      s.lerp_from_grad ? &update_planes<Param, Grad, has_l2, true> : &update_planes<Param, Grad, has_l2, false>;
  call(static_cast<Param*>(planes.param), planes.lo, planes.exp_avg, planes.exp_avg_sq,
       static_cast<const Grad*>(planes.grad), n, s);
}

template <typename Param, typename Grad>
OFFLOAD_TARGET void update_as(const Planes& planes, std::size_t n, const Scalars& s) {
  if (s.l2 != 0.0f)
    update_by_lerp<Param, Grad, true>(planes, n, s);
  else
    update_by_lerp<Param, Grad, false>(planes, n, s);
}

OFFLOAD_TARGET void update(Codec codec, GradDtype grad_dtype, const Planes& planes, std::size_t n, const Scalars& s) {
  if (codec == Codec::split_bf16) {
    if (grad_dtype == GradDtype::float32)
      update_as<std::uint16_t, float>(planes, n, s);
    else
      update_as<std::uint16_t, std::uint16_t>(planes, n, s);
  } else {
    if (grad_dtype == GradDtype::float32)
      update_as<float, float>(planes, n, s);
    else
      update_as<float, std::uint16_t>(planes, n, s);
  }
}

OFFLOAD_TARGET void split(const float* __restrict__ source, std::uint16_t* __restrict__ hi,
                          std::int16_t* __restrict__ lo, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = bits_of(source[i]);
    hi[i] = hi_of(bits);
    lo[i] = lo_of(bits);
  }
}

OFFLOAD_TARGET void merge(const std::uint16_t* __restrict__ hi, const std::int16_t* __restrict__ lo,
                          float* __restrict__ destination, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) destination[i] = float_of(merged(hi[i], lo[i]));
}

OFFLOAD_TARGET void canonicalize_nan(float* values, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) values[i] = float_of(canonical(bits_of(values[i])));
}
