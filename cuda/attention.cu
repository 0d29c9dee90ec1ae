// Which attention kernel serves which problem.
#include "cuda/attention/kernels.h"

namespace zenith {

Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  return attention::NaiveForward(args, launch);
}

Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  const Status status = attention::RowDelta(args, launch);
  if (!status.ok()) return status;
  return attention::NaiveBackward(args, launch);
}

}  // namespace zenith
