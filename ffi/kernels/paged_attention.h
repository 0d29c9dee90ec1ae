// Contract of attention over keys and values that lie in pages, the same for every back end.
//
//   page[b,h,s] = table[b,h, s / page_size], plus `pages` if negative, then moved into [0, pages)
//   key[b,h,s]  = row s % page_size of page[b,h,s] of head h in the pool of sequence b; so is value
//   out, lse    = attention.h of these keys and values
//
// A pool is the pages that some sequences share. Axes as in attention.h: there is one batch element
// for each sequence, and kv_len is the entries of a row of the table times page_size. Kwon et al.
// 2023, arXiv:2309.06180.
#pragma once

#include "ffi/kernels/attention.h"

namespace zenith {

/// key and value: of page 0; of their strides `batch` goes from pool to pool and `length` from
/// token to token of a page. No mask, bias or segments: band and interval say which keys a query
/// may see. What lies in the pages of other keys comes to nothing, NaN too; a few of the first
/// keys' may be read all the same, before the intervals are known. The exception is masked_row
/// kMean, the mean over all kv_len keys.
struct PagedAttentionArgs : AttentionForwardArgs {
  int64_t pages;      // of a pool, at least 1 if kv_len is not 0
  int64_t page_size;  // tokens
  int64_t sequences;  // of a pool
  int64_t key_page_stride, value_page_stride;
  const int32_t* table;  // any values; entries of a row side by side
  int64_t table_batch_stride, table_head_stride;
  bool nan_outside;      // an entry that has to be moved into [0, pages) makes its keys NaN instead
  bool zero_masked_row;  // a row without any allowed key is 0, whatever masked_row
};
Status PagedAttention(const PagedAttentionArgs& args, const Launch& launch);

/// What an entry of the table stands for.
struct PageEntry {
  int64_t page;
  bool outside;  // it had to be moved
};
constexpr PageEntry ReadEntry(int32_t entry, int64_t pages) {
  const int64_t page = entry < 0 ? entry + pages : entry;
  const int64_t last = pages - 1, nearest = page < 0 ? 0 : page > last ? last : page;
  return {nearest, nearest != page};
}

}  // namespace zenith
