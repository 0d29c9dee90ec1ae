// What the Hopper kernels have in common: a block of one producer and some consumer warpgroups, the
// barriers between them, and the tiles of work of a persistent block.
#pragma once

#include "cuda/attention/hopper/schedule.cuh"
#include "cuda/attention/hopper/tile.cuh"

namespace zenith::attention::hopper {

/// The producer is warpgroup 0.
constexpr int ThreadsOf(int consumers) { return (consumers + 1) * kWarpgroupSize; }
constexpr int WarpsOf(int consumers) { return consumers * kWarpgroupSize / kWarpSize; }

/// Registers of a thread: of 65536, a block starts with 168 in three warpgroups or 128 in four;
/// what the producer of two consumers leaves is theirs.
constexpr int ProducerRegisters(int consumers) { return consumers == 2 ? 24 : 32; }
constexpr int ConsumerRegisters(int consumers, int producer_registers) {
  return consumers == 2 ? (3 * 168 - producer_registers) / 2 : 160;
}

/// Which consumer this warpgroup is, in a register that the compiler knows to be uniform.
__device__ __forceinline__ int ConsumerIndex() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupSize, 0) - 1;
}

/// Buffers and their two barriers each: `full`, on which the producer's threads arrive when what
/// they store is there and the copies have started, and `empty`, on which every warp of the
/// consumers, or every thread, arrives when it is done.
template <int kStages>
struct BarrierRing {
  uint32_t barriers;

  __device__ __forceinline__ uint32_t full(uint32_t stage = 0) const {
    return barriers + 16 * stage;
  }
  __device__ __forceinline__ uint32_t empty(uint32_t stage = 0) const {
    return barriers + 16 * stage + 8;
  }
  __device__ __forceinline__ uint32_t end() const { return full(kStages); }
  static constexpr int kBytes = 16 * kStages;

  /// One thread; then BarrierInitFence and __syncthreads.
  __device__ __forceinline__ void Init(int consumer_arrivals, int producer_threads = 1) const {
    for (int stage = 0; stage < kStages; ++stage) {
      BarrierInit(full(stage), producer_threads);
      BarrierInit(empty(stage), consumer_arrivals);
    }
  }
};
using BarrierPair = BarrierRing<1>;

/// Where the next buffers are of two sequences that are filled in turn: one ring, if they have as
/// many (the producer's 24 registers are few).
template <int kFirst, int kSecond>
class RingPair {
 public:
  __device__ __forceinline__ const Ring<kFirst>& first() const { return first_; }
  __device__ __forceinline__ const Ring<kSecond>& second() const {
    if constexpr (kFirst == kSecond)
      return first_;
    else
      return second_;
  }
  __device__ __forceinline__ void Advance() {
    first_.Advance();
    if constexpr (kFirst != kSecond) second_.Advance();
  }

 private:
  Ring<kFirst> first_;
  Ring<kSecond> second_;
};

/// kRows queries of a head and the tiles of kCols keys in their band.
template <int kRows, int kCols>
struct QueryTile {
  int t0, head, batch, kv_head;
  int first, count;  // tiles of keys

  /// with_intervals: the whole warp; and there may be no key.
  __device__ __forceinline__ static QueryTile Of(const AttentionProblem& p,
                                                 const Schedule& schedule, const Band& band,
                                                 const Schedule::Item& item, bool with_intervals) {
    QueryTile tile(p, schedule, band, item);
    if (with_intervals) {
      const int2 keys = KeysSeen(p, band, ScoreOffsets(p, tile.head_index(p)), tile.t0,
                                 min(kRows, static_cast<int>(p.q_len) - tile.t0));
      tile.first = keys.x / kCols;
      tile.count = keys.x < keys.y ? (keys.y + kCols - 1) / kCols - tile.first : 0;
    }
    return tile;
  }
  __device__ __forceinline__ HeadIndex head_index(const AttentionProblem& p) const {
    return {batch, head, kv_head, head - kv_head * p.groups};
  }

 private:
  __device__ __forceinline__ QueryTile(const AttentionProblem& p, const Schedule& schedule,
                                       const Band& band, const Schedule::Item& item) {
    t0 = (schedule.tiles - 1 - item.tile) * kRows;  // late queries see the most keys: they go first
    batch = item.batch, head = item.head;
    kv_head = head / static_cast<int>(p.groups);
    const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
    first = band.KeysBegin(t0) / kCols;
    count = (band.KeysEnd(t0, min(kRows, q_len - t0), kv_len) + kCols - 1) / kCols - first;
  }
};

/// kRows keys of a head and the tiles of kCols queries, of each head of the group, that see them.
template <int kRows, int kCols>
struct KeyTile {
  int s0, batch, kv_head;
  int first, count;  // tiles of queries

  /// with_intervals: as in QueryTile.
  __device__ __forceinline__ static KeyTile Of(const AttentionProblem& p, const Band& band,
                                               const Schedule::Item& item, bool with_intervals) {
    KeyTile tile(p, band, item);
    if (with_intervals) {
      const int2 queries = QueriesSeeing(p, band, ScoreOffsets(p, tile.head_index(p, 0)), tile.s0,
                                         min(kRows, static_cast<int>(p.kv_len) - tile.s0));
      tile.first = queries.x / kCols;
      tile.count = queries.x < queries.y ? (queries.y + kCols - 1) / kCols - tile.first : 0;
    }
    return tile;
  }
  __device__ __forceinline__ HeadIndex head_index(const AttentionProblem& p, int group) const {
    return {batch, kv_head * p.groups + group, kv_head, group};
  }

 private:
  __device__ __forceinline__ KeyTile(const AttentionProblem& p, const Band& band,
                                     const Schedule::Item& item) {
    s0 = item.tile * kRows;  // early keys are seen by the most queries
    batch = item.batch, kv_head = item.head;
    const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
    first = band.QueriesBegin(s0) / kCols;
    const int end = band.QueriesEnd(s0, min(kRows, kv_len - s0), q_len);
    count = max(0, (end + kCols - 1) / kCols - first);
  }
};

/// Items for tiles of `rows` rows of length `length`. `blocks`: of the grid; lowered to the items.
inline Schedule MakeSchedule(const AttentionProblem& p, int64_t rows, int64_t length, int64_t heads,
                             int64_t head_bytes, int& blocks) {
  const int64_t tiles = (length + rows - 1) / rows, items = tiles * p.batch * heads;
  if (items < blocks) blocks = static_cast<int>(items);
  const bool equal = p.left >= p.q_len && p.right >= p.kv_len && !p.interval;
  // Examples that share a bias, 2 bytes a score, read it at the same time then: once from memory.
  const bool by_head = p.bias && p.bias_strides.batch == 0;
  return MakeSchedule(tiles, p.batch, heads, head_bytes, equal, by_head, blocks);
}
/// Query heads of a group stream the same keys and values.
template <typename Config>
Schedule ScheduleOfQueries(const AttentionProblem& p, int& blocks) {
  return MakeSchedule(p, Config::kRows, p.q_len, p.kv_heads * p.groups,
                      p.kv_len * (Config::kQkDim + Config::kVDim) * 2 / p.groups, blocks);
}
template <typename Config>
Schedule ScheduleOfKeys(const AttentionProblem& p, int& blocks) {
  return MakeSchedule(p, Config::kRows, p.kv_len, p.kv_heads,
                      p.q_len * p.groups * (Config::kQkDim + Config::kVDim) * 2, blocks);
}

}  // namespace zenith::attention::hopper
