// Picks the instruction set once, at the first call, and defines the contracts' functions. This
// file is compiled for the baseline machine, as all code outside isa_*.cc is.
#include "ffi/cpu/dispatch.h"

#include "ffi/cpu/launch.h"

namespace zenith {

#if defined(__x86_64__)
namespace avx512 {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
namespace portable {
extern const CpuKernels kKernels;
}

const CpuKernelChoice& RunnableCpuKernels() {
  static const CpuKernelChoice choice = [] {
    CpuKernelChoice result = {};
    int count = 0;
#if defined(__x86_64__)
    // __builtin_cpu_supports asks the operating system about the registers too. F16C, which not all
    // compilers let us ask for, came before AVX2 in every machine.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      result.tables[count++] = &avx512::kKernels;
    }
    if (has_avx2) result.tables[count++] = &avx2::kKernels;
#endif
    result.tables[count] = &portable::kKernels;
    return result;
  }();
  return choice;
}

static const CpuKernels& Best() { return *RunnableCpuKernels().tables[0]; }

Status ActivationForward(const ActivationForwardArgs& args, const Launch& launch) {
  return Best().activation_forward(args, launch);
}
Status ActivationBackward(const ActivationBackwardArgs& args, const Launch& launch) {
  return Best().activation_backward(args, launch);
}
Status GatedForward(const GatedForwardArgs& args, const Launch& launch) {
  return Best().gated_forward(args, launch);
}
Status GatedBackward(const GatedBackwardArgs& args, const Launch& launch) {
  return Best().gated_backward(args, launch);
}
Status SoftmaxForward(const SoftmaxForwardArgs& args, const Launch& launch) {
  return Best().softmax_forward(args, launch);
}
Status SoftmaxBackward(const SoftmaxBackwardArgs& args, const Launch& launch) {
  return Best().softmax_backward(args, launch);
}
Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch) {
  return Best().cross_entropy_forward(args, launch);
}
Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch) {
  return Best().cross_entropy_backward(args, launch);
}
Status NormForward(const NormForwardArgs& args, const Launch& launch) {
  return Best().norm_forward(args, launch);
}
Status NormBackward(const NormBackwardArgs& args, const Launch& launch) {
  return Best().norm_backward(args, launch);
}
Status GroupNormForward(const GroupNormForwardArgs& args, const Launch& launch) {
  return Best().group_norm_forward(args, launch);
}
Status GroupNormBackward(const GroupNormBackwardArgs& args, const Launch& launch) {
  return Best().group_norm_backward(args, launch);
}
Status Rope(const RopeArgs& args, const Launch& launch) { return Best().rope(args, launch); }
Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  return Best().attention_forward(args, launch);
}
Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  return Best().attention_backward(args, launch);
}
Status PagedAttention(const PagedAttentionArgs& args, const Launch& launch) {
  return Best().paged_attention(args, launch);
}
Status LinearForward(const LinearForwardArgs& args, const Launch& launch) {
  return Best().linear_forward(args, launch);
}
Status LinearBackward(const LinearBackwardArgs& args, const Launch& launch) {
  return Best().linear_backward(args, launch);
}
Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch) {
  return Best().quantized_linear(args, launch);
}
Status ConvForward(const ConvForwardArgs& args, const Launch& launch) {
  return Best().conv_forward(args, launch);
}

}  // namespace zenith
