// Attention over keys and values in pages: attention_forward.h, which copies blocks of keys anyway,
// page by page. No copy of the cache in one piece is made.
#pragma once

#include "ffi/cpu/attention_forward.h"
#include "ffi/kernels/paged_attention.h"

namespace zenith::ZENITH_ISA {

template <typename T>
class HeadKeys<T, PagedAttentionArgs> {
 public:
  HeadKeys(const PagedAttentionArgs& p, int64_t batch, int64_t kv_head)
      : p_(p),
        key_(KeyValueHead<T>(p.key, p.key_strides, batch / p.sequences, kv_head)),
        value_(KeyValueHead<T>(p.value, p.value_strides, batch / p.sequences, kv_head)),
        table_(p.table + batch * p.table_batch_stride + kv_head * p.table_head_stride) {}

  template <typename Body>
  ZENITH_INLINE void ForRuns(KeyRange keys, Body body) const {
    for (int64_t s = keys.first; s < keys.last;) {
      const int64_t index = s / p_.page_size, token = s % p_.page_size;
      const int64_t count = Min(keys.last - s, p_.page_size - token);
      const PageEntry entry = ReadEntry(table_[index], p_.pages);
      if (entry.outside && p_.nan_outside) {
        body(KeyRun<T>{s, count, nullptr, nullptr, true});
      } else {
        body(KeyRun<T>{
            s, count, key_ + entry.page * p_.key_page_stride + token * p_.key_strides.length,
            value_ + entry.page * p_.value_page_stride + token * p_.value_strides.length});
      }
      s += count;
    }
  }
  EmptyRow empty_row() const {
    return p_.zero_masked_row                  ? EmptyRow::kZero
           : p_.masked_row == MaskedRow::kMean ? EmptyRow::kMean
                                               : EmptyRow::kNan;
  }

 private:
  const PagedAttentionArgs& p_;
  const T *key_, *value_;
  const int32_t* table_;
};

inline Status PagedAttention(const PagedAttentionArgs& args, const Launch& launch) {
  return RunAttentionForward(args, launch);
}

}  // namespace zenith::ZENITH_ISA
