// Custom-call targets of attention and its cotangents. Contract: ffi/kernels/attention.h.
//
// Axes: *b batch, k key-value heads, g query heads that share one, t s query/key length, d
// query/key features, e value features. All operands come with logical shapes in this order; the
// attribute `layout` says in which physical order they lie, and whether the shapes, too, are in it.
#include "ffi/kernels/attention.h"

#include <algorithm>
#include <optional>

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {

/// Physical order of query, key, value, out and their cotangents.
enum class Layout : int32_t {
  kHeadMajor = 0,  // as the logical shape: [*b k g t d], [*b k s d]
  kLengthMajor =
      1,  // [*b t k g d], [*b s k d]: what a projection to (length, heads, features) gives
  kLengthMajorShapes = 2,  // the same, and so are the shapes
};
/// Operand::order of k g t d and of k s d among them.
constexpr int8_t kQueryOrder[] = {1, 2, 0, 3}, kKeyOrder[] = {1, 0, 2};

/// Bits of the attributes `..._axes`: the axes along which that operand varies. Along the others
/// its size is 1 and it is broadcast.
enum ScoreAxis : int64_t { kBatch = 1, kKvHead = 2, kGroup = 4, kQuery = 8, kKey = 16 };
inline constexpr int64_t kAbsent = -1;  // no such operand; an empty one stands in its place
inline constexpr int64_t kAllScoreAxes = kBatch | kKvHead | kGroup | kQuery | kKey;

struct AttentionAttributes {
  float scale, softcap;
  int64_t left, right;
  int32_t masked_row, layout, allow_tf32;
  int64_t mask_axes, bias_axes, interval_axes, query_segments_axes, key_segments_axes;
};

}  // namespace zenith

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::zenith::AttentionAttributes, ::xla::ffi::StructMember<float>("scale"),
    ::xla::ffi::StructMember<float>("softcap"), ::xla::ffi::StructMember<int64_t>("left"),
    ::xla::ffi::StructMember<int64_t>("right"), ::xla::ffi::StructMember<int32_t>("masked_row"),
    ::xla::ffi::StructMember<int32_t>("layout"), ::xla::ffi::StructMember<int32_t>("allow_tf32"),
    ::xla::ffi::StructMember<int64_t>("mask_axes"), ::xla::ffi::StructMember<int64_t>("bias_axes"),
    ::xla::ffi::StructMember<int64_t>("interval_axes"),
    ::xla::ffi::StructMember<int64_t>("query_segments_axes"),
    ::xla::ffi::StructMember<int64_t>("key_segments_axes"));

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

struct Sizes {
  int64_t batch, kv_heads, groups, q_len, kv_len, qk_dim, v_dim;
};

/// Strides of a dense tensor of `heads` heads in `layout`.
HeadStrides DenseStrides(Layout layout, int64_t heads, int64_t length, int64_t features) {
  HeadStrides strides{.batch = heads * length * features};
  if (layout == Layout::kHeadMajor) {
    strides.head = length * features;
    strides.length = features;
  } else {
    strides.head = features;
    strides.length = heads * features;
  }
  return strides;
}

/// A tensor over scores that is dense over the axes in a bit set, in the order of the bits.
struct BroadcastScores {
  ScoreStrides strides;
  int64_t size;
};

BroadcastScores DenseScores(int64_t axes, const Sizes& n) {
  BroadcastScores dense{.strides = {}, .size = 1};
  const auto add = [&](ScoreAxis axis, int64_t size, int64_t& stride) {
    if ((axes & axis) == 0) return;
    stride = dense.size;
    dense.size *= size;
  };
  add(kKey, n.kv_len, dense.strides.key);
  add(kQuery, n.q_len, dense.strides.query);
  add(kGroup, n.groups, dense.strides.group);
  add(kKvHead, n.kv_heads, dense.strides.kv_head);
  add(kBatch, n.batch, dense.strides.batch);
  return dense;
}

/// What every attention target is given.
struct Inputs {
  Operand query, key, value, mask, bias, interval, query_segments, key_segments;
  AttentionAttributes attributes;

  /// Takes the shapes as the layout says that they are.
  void ReadShapes() {
    if (attributes.layout != static_cast<int32_t>(Layout::kLengthMajorShapes)) return;
    query.order = kQueryOrder;
    key.order = value.order = kKeyOrder;
  }

  int64_t batch_rank() const { return query.rank() - 4; }
  Sizes sizes() const {
    return {.batch = query.leading_size(4),
            .kv_heads = query.dim(-4),
            .groups = query.dim(-3),
            .q_len = query.dim(-2),
            .kv_len = key.dim(-2),
            .qk_dim = query.dim(-1),
            .v_dim = value.dim(-1)};
  }
};

/// The sizes of an interval: its bounds lie along the key axis.
Sizes IntervalSizes(Sizes n) {
  n.kv_len = 2;
  return n;
}

/// `allowed`: the bits that may be set.
void CheckScores(Check& check, const Operand& x, int64_t axes, int64_t allowed, const Sizes& n,
                 const char* axes_invariant) {
  if (axes == kAbsent) {
    check.Size(x, 0, "it is absent");
    return;
  }
  check.That(axes >= 0 && (axes & ~allowed) == 0, axes_invariant, axes);
  if (check.failed()) return;
  check.Size(x, DenseScores(axes, n).size, "the product of the axes that its bit set names");
}

void CheckInputs(Check& check, const Inputs& in) {
  check.Float(in.query);
  check.RankAtLeast(in.query, 5);
  if (check.failed()) return;
  const Sizes n = in.sizes();
  const int64_t heads_rank = in.batch_rank() + 1;  // *b k
  check.SameType(in.key, in.query);
  check.Shape(in.key, in.query, heads_rank, {n.kv_len, n.qk_dim});
  check.SameType(in.value, in.query);
  check.Shape(in.value, in.key, heads_rank, {n.kv_len, n.v_dim});

  const AttentionAttributes& a = in.attributes;
  if (a.mask_axes != kAbsent) check.Type(in.mask, ffi::DataType::PRED);
  CheckScores(check, in.mask, a.mask_axes, kAllScoreAxes, n,
              "mask_axes must be -1 or a set of 5 bits");
  if (a.bias_axes != kAbsent) check.Float(in.bias);
  CheckScores(check, in.bias, a.bias_axes, kAllScoreAxes, n,
              "bias_axes must be -1 or a set of 5 bits");
  if (a.interval_axes != kAbsent) {
    check.Type(in.interval, ffi::DataType::S32);
    check.That((a.interval_axes & kKey) != 0, "interval_axes must have the bit of the key axis",
               a.interval_axes);
  }
  CheckScores(check, in.interval, a.interval_axes, kAllScoreAxes, IntervalSizes(n),
              "interval_axes must be -1 or a set of 5 bits");
  check.That((a.query_segments_axes == kAbsent) == (a.key_segments_axes == kAbsent),
             "segments must be of queries and keys, or of neither", a.query_segments_axes);
  if (a.query_segments_axes != kAbsent) {
    check.Type(in.query_segments, ffi::DataType::S32);
    check.Type(in.key_segments, ffi::DataType::S32);
  }
  CheckScores(check, in.query_segments, a.query_segments_axes, kBatch | kKvHead | kQuery, n,
              "query_segments_axes must be -1 or a set of batch, kv_head and query");
  CheckScores(check, in.key_segments, a.key_segments_axes, kBatch | kKvHead | kKey, n,
              "key_segments_axes must be -1 or a set of batch, kv_head and key");
  check.That(a.softcap >= 0, "softcap must not be negative or NaN",
             static_cast<int64_t>(a.softcap));
  check.That(a.layout >= 0 && a.layout <= 2, "layout must be 0 to 2", a.layout);
  check.That(a.masked_row == 0 || a.masked_row == 1, "masked_row must be 0 or 1", a.masked_row);
  check.That(a.allow_tf32 == 0 || a.allow_tf32 == 1, "allow_tf32 must be 0 or 1", a.allow_tf32);
}

/// out, dout: [*b k g t e] in the inputs' dtype.
void CheckOut(Check& check, const Operand& out, const Inputs& in) {
  check.SameType(out, in.query);
  check.Shape(out, in.query, in.batch_rank() + 3, {in.value.dim(-1)});
}

/// Room to work in: [*b k w], uint32, for any w.
void CheckScratch(Check& check, const Operand& scratch, const Inputs& in) {
  check.Type(scratch, ffi::DataType::U32);
  check.RankAtLeast(scratch, 1);
  if (check.failed()) return;
  check.Shape(scratch, in.query, in.batch_rank() + 1, {scratch.dim(-1)});
}

/// lse, delta: [*b k g t], float32.
void CheckRows(Check& check, const Operand& rows, const Inputs& in) {
  check.Type(rows, ffi::DataType::F32);
  check.Shape(rows, in.query, in.batch_rank() + 3, {});
}

AttentionProblem Problem(const Inputs& in, const Operand& scratch) {
  const AttentionAttributes& a = in.attributes;
  const Sizes n = in.sizes();
  const auto layout = static_cast<Layout>(a.layout);
  const bool has_mask = a.mask_axes != kAbsent, has_bias = a.bias_axes != kAbsent;
  const bool has_interval = a.interval_axes != kAbsent;
  const bool has_segments = a.query_segments_axes != kAbsent;
  return AttentionProblem{
      .dtype = DTypeOf(in.query),
      .allow_tf32 = a.allow_tf32 != 0,
      .batch = n.batch,
      .kv_heads = n.kv_heads,
      .groups = n.groups,
      .q_len = n.q_len,
      .kv_len = n.kv_len,
      .qk_dim = n.qk_dim,
      .v_dim = n.v_dim,
      .scale = a.scale,
      .softcap = a.softcap,
      // Clamped, so that a kernel may add a position to a bound without overflow.
      .left = std::clamp(a.left, -kUnbounded, kUnbounded),
      .right = std::clamp(a.right, -kUnbounded, kUnbounded),
      .masked_row = static_cast<MaskedRow>(a.masked_row),
      .query = in.query.data(),
      .key = in.key.data(),
      .value = in.value.data(),
      .query_strides = DenseStrides(layout, n.kv_heads * n.groups, n.q_len, n.qk_dim),
      .key_strides = DenseStrides(layout, n.kv_heads, n.kv_len, n.qk_dim),
      .value_strides = DenseStrides(layout, n.kv_heads, n.kv_len, n.v_dim),
      .out_strides = DenseStrides(layout, n.kv_heads * n.groups, n.q_len, n.v_dim),
      .mask = has_mask ? in.mask.data<const bool>() : nullptr,
      .mask_strides = DenseScores(has_mask ? a.mask_axes : 0, n).strides,
      .bias = has_bias ? in.bias.data() : nullptr,
      .bias_dtype = has_bias ? DTypeOf(in.bias) : DType::kF32,
      .bias_strides = DenseScores(has_bias ? a.bias_axes : 0, n).strides,
      .interval = has_interval ? in.interval.data<const int32_t>() : nullptr,
      .interval_strides = DenseScores(has_interval ? a.interval_axes : 0, IntervalSizes(n)).strides,
      .query_segments = has_segments ? in.query_segments.data<const int32_t>() : nullptr,
      .key_segments = has_segments ? in.key_segments.data<const int32_t>() : nullptr,
      .query_segments_strides = DenseScores(has_segments ? a.query_segments_axes : 0, n).strides,
      .key_segments_strides = DenseScores(has_segments ? a.key_segments_axes : 0, n).strides,
      .mask_scratch = scratch.data<uint32_t>(),
      .mask_scratch_words = scratch.size(),
  };
}

// ---- Targets ------------------------------------------------------------------------------------

ffi::Error Forward(Context context, Buffer query, Buffer key, Buffer value, Buffer mask,
                   Buffer bias, Buffer interval, Buffer query_segments, Buffer key_segments,
                   Result out_buffer, Result lse_buffer, Result lse_rest_buffer,
                   Result scratch_buffer, AttentionAttributes attributes) {
  Inputs in{.query = {"query", query},
            .key = {"key", key},
            .value = {"value", value},
            .mask = {"mask", mask},
            .bias = {"bias", bias},
            .interval = {"interval", interval},
            .query_segments = {"query_segments", query_segments},
            .key_segments = {"key_segments", key_segments},
            .attributes = attributes};
  in.ReadShapes();
  Operand out("out", out_buffer);
  out.order = in.query.order;
  const Operand lse("lse", lse_buffer);
  const Operand lse_rest("lse_rest", lse_rest_buffer), scratch("scratch", scratch_buffer);
  Check check("attention_fwd");
  CheckInputs(check, in);
  CheckOut(check, out, in);
  CheckRows(check, lse, in);
  CheckRows(check, lse_rest, in);
  CheckScratch(check, scratch, in);
  if (check.failed()) return check.error();

  const AttentionForwardArgs args{Problem(in, scratch), out.data(), lse.data<float>(),
                                  lse_rest.data<float>()};
  return Run("attention_fwd", context,
             [&](const Launch& launch) { return AttentionForward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // query [*b k g t d]
                           .Arg<Buffer>()  // key [*b k s d]
                           .Arg<Buffer>()  // value [*b k s e]
                           .Arg<Buffer>()  // mask, bool, dense over mask_axes
                           .Arg<Buffer>()  // bias, any float, dense over bias_axes
                           .Arg<Buffer>()  // interval, int32, dense over interval_axes
                           .Arg<Buffer>()  // query segments, int32, dense over their axes
                           .Arg<Buffer>()  // key segments, likewise
                           .Ret<Buffer>()  // out [*b k g t e]
                           .Ret<Buffer>()  // lse [*b k g t], float32
                           .Ret<Buffer>()  // lse_rest [*b k g t], float32
                           .Ret<Buffer>()  // [*b k w], uint32: scratch
                           .Attrs<AttentionAttributes>(),
                       kTraits);

struct BackwardCall {
  const char* target;
  Inputs in;
  Operand out, lse, lse_rest, dout, dlse;
  Operand dquery, dkey, dvalue, delta, scratch;
  std::optional<Operand> dbias = {};
};

ffi::Error Backward(Context& context, BackwardCall call) {
  Inputs& in = call.in;
  in.ReadShapes();
  call.out.order = call.dout.order = call.dquery.order = in.query.order;
  call.dkey.order = call.dvalue.order = in.key.order;
  Check check(call.target);
  CheckInputs(check, in);
  CheckOut(check, call.out, in);
  CheckRows(check, call.lse, in);
  if (call.lse_rest.size() > 0) CheckRows(check, call.lse_rest, in);
  CheckOut(check, call.dout, in);
  if (call.dlse.size() > 0) CheckRows(check, call.dlse, in);
  check.Same(call.dquery, in.query);
  check.Same(call.dkey, in.key);
  check.Same(call.dvalue, in.value);
  CheckRows(check, call.delta, in);
  CheckScratch(check, call.scratch, in);
  if (call.dbias) {
    check.Type(*call.dbias, ffi::DataType::F32);
    check.Shape(*call.dbias, in.query, in.batch_rank() + 3, {in.key.dim(-2)});
  }
  if (check.failed()) return check.error();

  const auto rows = [](const Operand& x) { return x.size() > 0 ? x.data<const float>() : nullptr; };
  const AttentionBackwardArgs args{Problem(in, call.scratch),
                                   call.out.data(),
                                   call.dout.data(),
                                   call.lse.data<const float>(),
                                   rows(call.lse_rest),
                                   rows(call.dlse),
                                   call.delta.data<float>(),
                                   call.dquery.data(),
                                   call.dkey.data(),
                                   call.dvalue.data(),
                                   call.dbias ? call.dbias->data<float>() : nullptr};
  return Run(call.target, context,
             [&](const Launch& launch) { return AttentionBackward(args, launch); });
}

ffi::Error BackwardWithoutBias(Context context, Buffer query, Buffer key, Buffer value, Buffer mask,
                               Buffer bias, Buffer interval, Buffer query_segments,
                               Buffer key_segments, Buffer out, Buffer lse, Buffer lse_rest,
                               Buffer dout, Buffer dlse, Result dquery, Result dkey, Result dvalue,
                               Result delta, Result scratch, AttentionAttributes attributes) {
  return Backward(context, {.target = "attention_bwd",
                            .in = {.query = {"query", query},
                                   .key = {"key", key},
                                   .value = {"value", value},
                                   .mask = {"mask", mask},
                                   .bias = {"bias", bias},
                                   .interval = {"interval", interval},
                                   .query_segments = {"query_segments", query_segments},
                                   .key_segments = {"key_segments", key_segments},
                                   .attributes = attributes},
                            .out = {"out", out},
                            .lse = {"lse", lse},
                            .lse_rest = {"lse_rest", lse_rest},
                            .dout = {"dout", dout},
                            .dlse = {"dlse", dlse},
                            .dquery = {"dquery", dquery},
                            .dkey = {"dkey", dkey},
                            .dvalue = {"dvalue", dvalue},
                            .delta = {"delta", delta},
                            .scratch = {"scratch", scratch}});
}

XLA_FFI_DEFINE_HANDLER(kBackward, BackwardWithoutBias,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // query [*b k g t d]
                           .Arg<Buffer>()  // key [*b k s d]
                           .Arg<Buffer>()  // value [*b k s e]
                           .Arg<Buffer>()  // mask, bool, dense over mask_axes
                           .Arg<Buffer>()  // bias, any float, dense over bias_axes
                           .Arg<Buffer>()  // interval, int32, dense over interval_axes
                           .Arg<Buffer>()  // query segments, int32, dense over their axes
                           .Arg<Buffer>()  // key segments, likewise
                           .Arg<Buffer>()  // out [*b k g t e]
                           .Arg<Buffer>()  // lse [*b k g t], float32
                           .Arg<Buffer>()  // lse_rest [*b k g t], float32; empty for 0
                           .Arg<Buffer>()  // dout [*b k g t e]
                           .Arg<Buffer>()  // dlse [*b k g t], float32; empty for 0
                           .Ret<Buffer>()  // dquery [*b k g t d]
                           .Ret<Buffer>()  // dkey [*b k s d]
                           .Ret<Buffer>()  // dvalue [*b k s e]
                           .Ret<Buffer>()  // delta [*b k g t], float32: scratch
                           .Ret<Buffer>()  // [*b k w], uint32: scratch
                           .Attrs<AttentionAttributes>(),
                       kTraits);

ffi::Error BackwardWithBias(Context context, Buffer query, Buffer key, Buffer value, Buffer mask,
                            Buffer bias, Buffer interval, Buffer query_segments,
                            Buffer key_segments, Buffer out, Buffer lse, Buffer lse_rest,
                            Buffer dout, Buffer dlse, Result dquery, Result dkey, Result dvalue,
                            Result delta, Result dbias, Result scratch,
                            AttentionAttributes attributes) {
  return Backward(context, {.target = "attention_bias_bwd",
                            .in = {.query = {"query", query},
                                   .key = {"key", key},
                                   .value = {"value", value},
                                   .mask = {"mask", mask},
                                   .bias = {"bias", bias},
                                   .interval = {"interval", interval},
                                   .query_segments = {"query_segments", query_segments},
                                   .key_segments = {"key_segments", key_segments},
                                   .attributes = attributes},
                            .out = {"out", out},
                            .lse = {"lse", lse},
                            .lse_rest = {"lse_rest", lse_rest},
                            .dout = {"dout", dout},
                            .dlse = {"dlse", dlse},
                            .dquery = {"dquery", dquery},
                            .dkey = {"dkey", dkey},
                            .dvalue = {"dvalue", dvalue},
                            .delta = {"delta", delta},
                            .scratch = {"scratch", scratch},
                            .dbias = Operand{"dbias", dbias}});
}

XLA_FFI_DEFINE_HANDLER(kBiasBackward, BackwardWithBias,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // query [*b k g t d]
                           .Arg<Buffer>()  // key [*b k s d]
                           .Arg<Buffer>()  // value [*b k s e]
                           .Arg<Buffer>()  // mask, bool, dense over mask_axes
                           .Arg<Buffer>()  // bias, any float, dense over bias_axes
                           .Arg<Buffer>()  // interval, int32, dense over interval_axes
                           .Arg<Buffer>()  // query segments, int32, dense over their axes
                           .Arg<Buffer>()  // key segments, likewise
                           .Arg<Buffer>()  // out [*b k g t e]
                           .Arg<Buffer>()  // lse [*b k g t], float32
                           .Arg<Buffer>()  // lse_rest [*b k g t], float32; empty for 0
                           .Arg<Buffer>()  // dout [*b k g t e]
                           .Arg<Buffer>()  // dlse [*b k g t], float32; empty for 0
                           .Ret<Buffer>()  // dquery [*b k g t d]
                           .Ret<Buffer>()  // dkey [*b k s d]
                           .Ret<Buffer>()  // dvalue [*b k s e]
                           .Ret<Buffer>()  // delta [*b k g t], float32: scratch
                           .Ret<Buffer>()  // dbias [*b k g t s], float32
                           .Ret<Buffer>()  // [*b k w], uint32: scratch
                           .Attrs<AttentionAttributes>(),
                       kTraits);

}  // namespace

std::span<const Target> AttentionTargets() {
  static constexpr Target kTargets[] = {
      {"attention_fwd", kForward},
      {"attention_bwd", kBackward},
      {"attention_bias_bwd", kBiasBackward},
  };
  return kTargets;
}

}  // namespace zenith
