// Custom-call target of attention over pages of keys and values. Contract:
// ffi/kernels/paged_attention.h.
//
// Axes: *o pools, k key-value heads, n sequences of a pool, g query heads that share one, t query
// length, p pages of a pool, c tokens of a page, d query/key features, e value features, m entries
// of a sequence in the table. All operands come with logical shapes in this order; query, out, lse,
// table and interval lie as [*o n t k g d], [*o n t k g e], [*o n k g t], [*o n k m], [*o n k t 2].
// The attribute `shapes_in_layout` says that the shapes, too, are given as the arrays lie.
#include "ffi/kernels/paged_attention.h"

#include <algorithm>

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {

/// Where in pages [p c d] the axis of heads lies: [*o k p c d], [*o p k c d] or [*o p c k d].
enum class HeadsAxis : int32_t { kFirst = 0, kSecond = 1, kThird = 2 };

/// What a row without any allowed key is.
enum class EmptyRow : int32_t { kNan = 0, kMean = 1, kZero = 2 };

struct PagedAttentionAttributes {
  float scale, softcap;
  int64_t left, right;
  int32_t empty_row, heads_axis;
  bool nan_outside, shapes_in_layout;
};

}  // namespace zenith

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::zenith::PagedAttentionAttributes, ::xla::ffi::StructMember<float>("scale"),
    ::xla::ffi::StructMember<float>("softcap"), ::xla::ffi::StructMember<int64_t>("left"),
    ::xla::ffi::StructMember<int64_t>("right"), ::xla::ffi::StructMember<int32_t>("empty_row"),
    ::xla::ffi::StructMember<int32_t>("heads_axis"), ::xla::ffi::StructMember<bool>("nan_outside"),
    ::xla::ffi::StructMember<bool>("shapes_in_layout"));

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

/// Operand::order of k n g t d, k n g t (and k n t 2) and k n m as they lie, and of k p c d by
/// HeadsAxis.
constexpr int8_t kQueryOrder[] = {2, 0, 3, 1, 4}, kRowsOrder[] = {1, 0, 2, 3},
                 kTableOrder[] = {1, 0, 2};
constexpr int8_t kPagesOrders[][4] = {{0, 1, 2, 3}, {1, 0, 2, 3}, {2, 0, 1, 3}};

/// Strides of the pages of all heads and pools, and that from page to page.
struct PageStrides {
  HeadStrides strides;
  int64_t page;
};

PageStrides DensePages(HeadsAxis axis, int64_t heads, int64_t pages, int64_t page_size,
                       int64_t features) {
  const int64_t pool = heads * pages * page_size * features;
  switch (axis) {
    case HeadsAxis::kFirst:
      return {{.batch = pool, .head = pages * page_size * features, .length = features},
              page_size * features};
    case HeadsAxis::kSecond:
      return {{.batch = pool, .head = page_size * features, .length = features},
              heads * page_size * features};
    default:
      return {{.batch = pool, .head = features, .length = heads * features},
              heads * page_size * features};
  }
}

/// x: [*o k n ...] with the sizes of `query`, k or 1 heads, or flat for one head. Whether the rows
/// of heads differ.
bool CheckRows(Check& check, const Operand& x, const Operand& query) {
  const int64_t heads_axis = query.rank() - 5;
  if (x.rank() == 1) return false;
  check.RankAtLeast(x, heads_axis + 3);
  for (int64_t i = 0; i < heads_axis + 2; ++i) {
    if (i == heads_axis && x.dim(i) == 1) continue;
    check.That(x.dim(i) == query.dim(i), "table and interval must have the batch sizes of query",
               x.dim(i));
  }
  return x.dim(heads_axis) != 1;
}

ffi::Error Forward(Context context, Buffer query_buffer, Buffer key_buffer, Buffer value_buffer,
                   Buffer table_buffer, Buffer interval_buffer, Result out_buffer,
                   Result lse_buffer, Result lse_rest_buffer, PagedAttentionAttributes a) {
  Operand query("query", query_buffer), key("key_pages", key_buffer);
  Operand value("value_pages", value_buffer), table("table", table_buffer);
  Operand interval("interval", interval_buffer);
  Operand out("out", out_buffer), lse("lse", lse_buffer), lse_rest("lse_rest", lse_rest_buffer);
  Check check("paged_attention_fwd");
  check.That(a.heads_axis >= 0 && a.heads_axis <= 2, "heads_axis must be 0, 1 or 2", a.heads_axis);
  if (check.failed()) return check.error();
  if (a.shapes_in_layout) {
    query.order = out.order = kQueryOrder;
    key.order = value.order = kPagesOrders[a.heads_axis];
    table.order = kTableOrder;
    interval.order = lse.order = lse_rest.order = kRowsOrder;
  }
  check.Float(query);
  check.RankAtLeast(query, 5);
  if (check.failed()) return check.error();
  const int64_t heads_rank = query.rank() - 4;  // *o k
  const int64_t pools = query.leading_size(5), heads = query.dim(-5), sequences = query.dim(-4);
  const int64_t groups = query.dim(-3), q_len = query.dim(-2), qk_dim = query.dim(-1);
  const int64_t pages = key.dim(-3), page_size = key.dim(-2), v_dim = value.dim(-1);
  check.SameType(key, query);
  check.Shape(key, query, heads_rank, {pages, page_size, qk_dim});
  check.SameType(value, query);
  check.Shape(value, query, heads_rank, {pages, page_size, v_dim});
  check.Type(table, ffi::DataType::S32);
  check.RankAtLeast(table, 1);
  check.Type(interval, ffi::DataType::S32);
  if (check.failed()) return check.error();

  const int64_t rows = pools * sequences, bounds = q_len * 2;
  const bool table_of_head = CheckRows(check, table, query), flat_table = table.rank() == 1;
  const bool interval_of_head = CheckRows(check, interval, query);
  const int64_t entries = !flat_table ? table.dim(-1) : rows == 0 ? 0 : table.size() / rows;
  check.Size(table, rows * (table_of_head ? heads : 1) * entries, "whole rows of the table");
  check.Size(interval, rows * (interval_of_head ? heads : 1) * bounds, "two bounds for each query");
  check.That(entries == 0 || rows == 0 || pages > 0, "key_pages must hold a page", pages);
  check.SameType(out, query);
  check.Shape(out, query, heads_rank + 3, {v_dim});
  check.Type(lse, ffi::DataType::F32);
  check.Shape(lse, query, heads_rank + 3, {});
  check.Type(lse_rest, ffi::DataType::F32);
  check.Shape(lse_rest, query, heads_rank + 3, {});
  check.That(a.softcap >= 0, "softcap must not be negative or NaN",
             static_cast<int64_t>(a.softcap));
  check.That(a.empty_row >= 0 && a.empty_row <= 2, "empty_row must be 0, 1 or 2", a.empty_row);
  if (check.failed()) return check.error();

  const auto axis = static_cast<HeadsAxis>(a.heads_axis);
  const PageStrides keys = DensePages(axis, heads, pages, page_size, qk_dim);
  const PageStrides values = DensePages(axis, heads, pages, page_size, v_dim);
  const auto of_query = [&](int64_t features) {
    return HeadStrides{.batch = q_len * heads * groups * features,
                       .head = features,
                       .length = heads * groups * features};
  };
  const int64_t table_rows = table_of_head ? heads : 1;
  const int64_t interval_rows = interval_of_head ? heads : 1;

  PagedAttentionArgs args = {};
  args.dtype = DTypeOf(query);
  args.batch = rows, args.kv_heads = heads, args.groups = groups, args.q_len = q_len;
  args.kv_len = entries * page_size, args.qk_dim = qk_dim, args.v_dim = v_dim;
  args.scale = a.scale, args.softcap = a.softcap;
  args.left = std::clamp(a.left, -kUnbounded, kUnbounded);
  args.right = std::clamp(a.right, -kUnbounded, kUnbounded);
  const auto empty_row = static_cast<EmptyRow>(a.empty_row);
  args.masked_row = empty_row == EmptyRow::kMean ? MaskedRow::kMean : MaskedRow::kNan;
  args.zero_masked_row = empty_row == EmptyRow::kZero;
  args.query = query.data(), args.key = key.data(), args.value = value.data();
  args.query_strides = of_query(qk_dim), args.out_strides = of_query(v_dim);
  args.key_strides = keys.strides, args.value_strides = values.strides;
  args.key_page_stride = keys.page, args.value_page_stride = values.page;
  args.interval = interval.data<const int32_t>();
  args.interval_strides = {.batch = interval_rows * bounds,
                           .kv_head = interval_of_head ? bounds : 0,
                           .query = 2,
                           .key = 1};
  args.out = out.data(), args.lse = lse.data<float>(), args.lse_rest = lse_rest.data<float>();
  args.pages = pages, args.page_size = page_size, args.sequences = sequences;
  args.table = table.data<const int32_t>();
  args.table_batch_stride = table_rows * entries;
  args.table_head_stride = table_of_head ? entries : 0;
  args.nan_outside = a.nan_outside;
  return Run("paged_attention_fwd", context,
             [&](const Launch& launch) { return PagedAttention(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // query [*o k n g t d]
                           .Arg<Buffer>()  // key pages [*o k p c d]
                           .Arg<Buffer>()  // value pages [*o k p c e]
                           .Arg<Buffer>()  // table [*o k n m], int32; k may be 1; or flat
                           .Arg<Buffer>()  // interval [*o k n t 2], int32; k may be 1; or flat
                           .Ret<Buffer>()  // out [*o k n g t e]
                           .Ret<Buffer>()  // lse [*o k n g t], float32
                           .Ret<Buffer>()  // lse_rest [*o k n g t], float32
                           .Attrs<PagedAttentionAttributes>(),
                       kTraits);

}  // namespace

std::span<const Target> PagedAttentionTargets() {
  static constexpr Target kTargets[] = {{"paged_attention_fwd", kForward}};
  return kTargets;
}

}  // namespace zenith
