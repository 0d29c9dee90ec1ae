// A bias or a mask beside the tiles of keys or queries that the producer brings. Consumers that
// read global memory themselves waited for it with nothing else to do: of two warps a scheduler
// both stood still, and a mask of 4096 keys, read eight scores at a time, doubled the forward's
// time.
//
// A bias of a 16-bit type comes by TMA, as it lies, in blocks of 64 keys (128 bytes, swizzled:
// chunk c of row r lies at c ^ (r % 8)), or of 32 where tiles are no multiple of 64 (64 bytes, c ^
// (r / 2 % 4)), one row for all queries where the tensor has one. ldmatrix then gives each lane the
// very elements of its scores, transposed where rows are keys. A mask comes as bits
// (mask_tiles.cuh), a row for each query, or for each key where rows are keys.
//
// What lies otherwise (a bias of float32, keys that are not side by side, odd lengths; a mask
// without scratch) the consumers of kAny read as they do on other GPUs (cuda/attention/score.cuh).
#pragma once

#include "cuda/attention/hopper/fragment.cuh"
#include "cuda/attention/hopper/mask_tiles.cuh"
#include "cuda/attention/hopper/pipeline.cuh"

namespace zenith::attention::hopper {

inline constexpr int kBiasColumns = 32;                 // keys of a block
inline constexpr int kBiasRowBytes = 2 * kBiasColumns;  // of a block
inline constexpr int kWideBiasColumns = 64;  // TMA takes no longer for rows of 128 bytes than of 64
inline constexpr int kBiasAhead = 4;         // tiles between the request and the copy
/// Of a row of bits of a tile of `columns`. Copies begin at multiples of 16 bytes, 128 columns (at
/// others the instruction is illegal): a tile of 96 may lie across one.
constexpr int BitsRowBytes(int columns) { return 128 % columns == 0 ? 16 : 32; }
constexpr int BiasBytes(int queries, int keys) { return 2 * queries * keys; }

/// What happens to scores: nothing; -inf where MaskTiles say so, all that is masked being in there;
/// a bias that comes in tiles, alone; or anything but a softcap.
enum class Scores { kPlain, kMasked, kBias, kAny };

/// Which of them come in tiles, and how.
struct ScoreTiles {
  CUtensorMap bias, bits;
  MaskTiles mask;
  bool has_bias, has_classes, has_bits;
  bool one_row;            // the bias is the same for all queries
  bool by_batch, by_head;  // whether the bias has these axes
  bool natural;  // scores become natural logits; otherwise the scale is left to the exponent

  __device__ __forceinline__ int bias_bytes(int queries, int keys) const {
    return has_bias ? BiasBytes(one_row ? 1 : queries, keys) : 0;
  }
  /// Copies the block of biases from (t, s) on, kColumns keys at a time.
  template <int kQueries, int kKeys, int kColumns = kBiasColumns>
  __device__ __forceinline__ void LoadBias(uint32_t tile, uint32_t barrier, int t, int s, int head,
                                           int batch) const {
#pragma unroll
    for (int block = 0; block < kKeys / kColumns; ++block)
      TmaLoad(tile + block * kQueries * 2 * kColumns, bias, barrier, s + block * kColumns,
              one_row ? 0 : t, by_head ? head : 0, by_batch ? batch : 0);
  }

  /// Asks for such a block, from memory to L2.
  template <int kQueries, int kKeys>
  __device__ __forceinline__ void PrefetchBias(int t, int s, int head, int batch) const {
#pragma unroll
    for (int block = 0; block < kKeys / kBiasColumns; ++block)
      TmaPrefetchBox(bias, s + block * kBiasColumns, one_row ? 0 : t, by_head ? head : 0,
                     by_batch ? batch : 0);
  }

  /// Bits of a tile, its rows queries if kByQuery.
  template <bool kByQuery>
  __device__ __forceinline__ int bits_bytes(int rows, int columns) const {
    return BitsRowBytes(columns) * (kByQuery && mask.queries == 1 ? 1 : rows);
  }
  /// Copies the bits of the tile whose first score is (row, col).
  template <bool kByQuery>
  __device__ __forceinline__ void LoadBits(uint32_t tile, uint32_t barrier, int matrix, int row,
                                           int col) const {
    const bool alike = mask.queries == 1;
    TmaLoad(tile, bits, barrier, !kByQuery && alike ? 0 : col / 128 * 8,  // 16-bit elements
            kByQuery && alike ? 0 : row, matrix, 0);
  }
};

/// What the producer tells consumers of a tile: which it is, whether it is the last, and whether
/// mask, interval and segments allow all of it.
struct TileMessage {
  static constexpr int kLast = 1, kOpen = 2, kFlagBits = 2;
  static constexpr int kBytes = 8;  // in shared memory: the word, and the head's place in its group
  int word = 0;

  __device__ __forceinline__ int tile() const { return word >> kFlagBits; }
  __device__ __forceinline__ bool last() const { return word & kLast; }
  __device__ __forceinline__ bool is_open() const { return word & kOpen; }
};

/// A message for each buffer, and one for the rows: whether they have any tile.
template <int kStages>
struct MessageRing {
  uint32_t messages;

  /// Before the producer arrives on the buffer's barrier.
  __device__ __forceinline__ void Store(uint32_t stage, int tile, bool last, bool open,
                                        int group = 0) const {
    const int word = tile << TileMessage::kFlagBits | (last ? TileMessage::kLast : 0) |
                     (open ? TileMessage::kOpen : 0);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(At(stage)), "r"(word), "r"(group)
                 : "memory");
  }
  __device__ __forceinline__ void StoreAny(bool any) const { Store(kStages, any, false, false); }
  /// After the barrier; the reader then releases the buffer itself, not its warp for it.
  __device__ __forceinline__ TileMessage Load(uint32_t stage) const {
    return {static_cast<int>(LoadShared32(At(stage)))};
  }
  __device__ __forceinline__ int LoadGroup(uint32_t stage) const {
    return static_cast<int>(LoadShared32(At(stage) + 4));
  }
  __device__ __forceinline__ bool LoadAny() const { return Load(kStages).tile() != 0; }

 private:
  __device__ __forceinline__ uint32_t At(uint32_t stage) const {
    return messages + stage * TileMessage::kBytes;
  }
};

/// Tiles from the last to the first, but for those in which nothing is allowed. A whole warp of the
/// producer.
class TileWalk {
 public:
  struct Step {
    int tile;  // -1: no more
    bool is_open;
  };

  __device__ __forceinline__ TileWalk(int first, int count)
      : first_(first), next_(first + count - 1), base_(first + count) {}

  /// `class_of(tile)`: MaskTiles::Class, if `by_class`.
  template <typename ClassOf>
  __device__ __forceinline__ Step Next(bool by_class, ClassOf class_of) {
    if (!by_class) return next_ < first_ ? Step{-1, false} : Step{next_--, false};
    while (next_ >= first_) {
      if (next_ < base_) {
        base_ = next_ - (kWarpSize - 1);
        const int tile = base_ + static_cast<int>(threadIdx.x % kWarpSize);
        const uint32_t x = tile < first_ ? 0 : class_of(tile);
        some_ = __ballot_sync(kAllLanes, x & kAnyAllowed);
        open_ = __ballot_sync(kAllLanes, x & kAllAllowed);
      }
      const uint32_t left = some_ & ~0u >> (kWarpSize - 1 - (next_ - base_));
      if (left == 0) {
        next_ = base_ - 1;
        continue;
      }
      const int bit = kWarpSize - 1 - __clz(static_cast<int>(left));
      next_ = base_ + bit - 1;
      return {base_ + bit, (open_ >> bit & 1) != 0};
    }
    return {-1, false};
  }

 private:
  int first_, next_;
  int base_;  // `some_` and `open_` are of the tiles from here on
  uint32_t some_ = 0, open_ = 0;
};

// The consumers' side.

/// Where a lane finds its elements of a tile of bias.
struct BiasLane {
  uint32_t address;  // of the first 16 columns (rows where rows are keys)
  uint32_t step;     // bytes to the next block of columns (to the next 32 rows)

  /// Rows are queries, from `row` of the tile's on for this warp, of a tile of `queries`.
  template <int kColumns = kBiasColumns>
  __device__ __forceinline__ static BiasLane ByQuery(const ScoreTiles& tiles, int row,
                                                     int queries) {
    constexpr int kRowBytes = 2 * kColumns;
    const int lane = threadIdx.x % kWarpSize;
    const int r = tiles.one_row ? 0 : row + lane % 16, chunk = lane / 16;
    const int swizzle = kColumns == kWideBiasColumns ? r % 8 : r / 2 % 4;
    return {static_cast<uint32_t>(r * kRowBytes + ((chunk ^ swizzle) << 4)),
            static_cast<uint32_t>(queries * kRowBytes)};
  }
  /// Rows are keys, from `row` of the tile's on for this warp.
  __device__ __forceinline__ static BiasLane ByKey(const ScoreTiles& tiles, int row, int queries) {
    const int lane = threadIdx.x % kWarpSize;
    const int r = tiles.one_row ? 0 : lane % 8 + lane / 16 * 8;
    const int chunk = row % kBiasColumns / 8 + lane / 8 % 2;
    return {static_cast<uint32_t>(row / kBiasColumns * queries * kBiasRowBytes + r * kBiasRowBytes +
                                  ((chunk ^ (r / 2 % 4)) << 4)),
            static_cast<uint32_t>(tiles.one_row ? 0 : 32 * kBiasRowBytes)};
  }
};

/// scores = scale * scores + bias, of elements of E.
template <typename E, bool kByQuery, int kColumns, int N>
__device__ __forceinline__ void AddBiasTile(float (&scores)[N], uint32_t tile, const BiasLane& lane,
                                            float scale) {
#pragma unroll
  for (int k = 0; k < N / 8; ++k) {  // 16 columns
    uint32_t words[4];
    if constexpr (kByQuery) {
      constexpr int kPairs = kColumns / 16;  // of chunks of a row
      LoadMatrix4(words, (tile + lane.address + k / kPairs * lane.step) ^ (k % kPairs << 5));
    } else {
      const uint32_t address = tile + lane.address + k / 2 * lane.step;
      LoadMatrix4Transposed(words, k % 2 ? address + lane.step / 2 : address);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& score = scores[8 * k + j];
      score = fmaf(score, scale, ToFloat(ElementOf<E>(words[j / 2], j % 2)));
    }
  }
}

/// -inf where the bits of this lane's two rows are 0. `col`: the tile's first column. `one_row`:
/// the tile has one row, for all.
template <int N>
__device__ __forceinline__ void ApplyBits(float (&scores)[N], uint32_t tile, int row, int col,
                                          bool one_row) {
  constexpr int kColumns = 2 * N, kRowBytes = BitsRowBytes(kColumns), kWords = kColumns / 32;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kColumns < 128) tile += col / 32 % 4 * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t address = tile + (one_row ? 0 : row + lane / 4 + 8 * half) * kRowBytes;
    uint32_t words[kWords];
    if constexpr (kWords == 4)
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address)
                   : "memory");
    else
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = LoadShared32(address + 4 * i);
#pragma unroll
    for (uint32_t& word : words) word >>= lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[4 * j + 2 * half + i];
        score = words[j / 4] & 1u << (8 * (j % 4) + i) ? score : -INFINITY;
      }
  }
}

/// What a consumer of kModified makes of scores: natural logits, or where nothing asks for them
/// products that the exponent will scale; -inf where not allowed. `row`, `col`: of this warp's
/// scores; `tile_row`: in the tile. `bias`, `bits`: the tiles. `whole`: as in ApplyBandMaskBias.
template <bool kByQuery, Scores kScores, int N>
__device__ __forceinline__ void ApplyAll(float (&scores)[N], const AttentionProblem& p,
                                         const ScoreTiles& tiles, const Band& band,
                                         const HeadIndex& head, const BiasLane& bias_lane,
                                         uint32_t bias, uint32_t bits, TileMessage message, int row,
                                         int col, int tile_row, bool whole) {
  auto& fragment = reinterpret_cast<float (&)[1][N / 4][4]>(scores);
  constexpr int kColumns = kScores == Scores::kBias ? kWideBiasColumns : kBiasColumns;
  if constexpr (kScores == Scores::kAny || kScores == Scores::kBias) {
    if (kScores == Scores::kBias || tiles.has_bias) {
      if (p.bias_dtype == DType::kF16)
        AddBiasTile<__half, kByQuery, kColumns>(scores, bias, bias_lane, p.scale);
      else
        AddBiasTile<__nv_bfloat16, kByQuery, kColumns>(scores, bias, bias_lane, p.scale);
    } else if (tiles.natural) {
#pragma unroll
      for (int i = 0; i < N; ++i) scores[i] *= p.scale;
      if (p.bias) AddBias<kByQuery>(fragment, p, ScoreOffsets(p, head), OriginOf(row, col));
    }
  }
  if (kScores != Scores::kBias && !message.is_open()) {
    if (tiles.has_bits) {  // interval and segments are in there
      const bool alike = tiles.mask.queries == 1;
      ApplyBits(scores, bits, tile_row, !kByQuery && alike ? 0 : col, kByQuery && alike);
    } else {
      if constexpr (kScores == Scores::kAny)
        if (p.mask) ApplyMask<kByQuery>(fragment, p, ScoreOffsets(p, head), OriginOf(row, col));
      if (p.interval) ApplyIntervals<kByQuery>(fragment, p, ScoreOffsets(p, head), row, col);
      if (p.query_segments) ApplySegments<kByQuery>(fragment, p, ScoreOffsets(p, head), row, col);
    }
  }
  if (!whole)
    ApplyBand<kByQuery>(scores, band, row, col, static_cast<int>(kByQuery ? p.kv_len : p.q_len));
}

/// Whether TMA can copy a problem's bias: of 16 bits, keys side by side, heads one behind the other
/// (of a group, and the groups) or the same for all.
inline bool BiasFitsTiles(const AttentionProblem& p) {
  if (!p.bias || p.bias_dtype == DType::kF32) return false;
  const ScoreStrides& x = p.bias_strides;
  const int64_t head = p.groups == 1 ? x.kv_head : x.group;
  const bool regular = p.groups == 1 || p.kv_heads == 1 || x.kv_head == p.groups * x.group;
  return regular && x.key == 1 && (x.batch | head | x.query | p.kv_len) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.bias) % 16 == 0;
}

/// Decides what comes in tiles of `queries` x `keys` scores and makes the maps.
template <bool kByQuery, int kColumns = kBiasColumns>
Status MakeScoreTiles(const AttentionProblem& p, int queries, int keys, ScoreTiles& tiles) {
  tiles = {};
  tiles.natural = p.bias || !(p.scale > 0);
  if (FindMaskTiles(p, tiles.mask)) {
    tiles.has_classes = true, tiles.has_bits = p.mask;
  }
  if (tiles.has_bits) {
    const MaskTiles& mask = tiles.mask;
    const int64_t rows = kByQuery ? mask.queries : mask.keys;
    const int64_t features = 2 * (kByQuery ? mask.row_words : mask.column_words);
    const Status status =
        MakeTensorMap({DType::kF16, kByQuery ? mask.by_query : mask.by_key, 1, mask.matrices, rows,
                       features, mask.matrices * rows * features, rows * features, features},
                      kByQuery ? (mask.queries == 1 ? 1 : queries) : keys, tiles.bits,
                      BitsRowBytes(kByQuery ? keys : queries) / 2);
    if (!status.ok()) return status;
  }
  if (!BiasFitsTiles(p)) return {};
  const ScoreStrides& x = p.bias_strides;
  const int64_t head = p.groups == 1 ? x.kv_head : x.group;
  tiles.has_bias = true;
  tiles.one_row = x.query == 0;
  tiles.by_batch = x.batch != 0, tiles.by_head = head != 0;
  const int64_t row = tiles.one_row ? p.kv_len : x.query;  // a length of 1 needs some stride
  return MakeTensorMap({p.bias_dtype, p.bias, tiles.by_batch ? p.batch : 1,
                        tiles.by_head ? p.kv_heads * p.groups : 1, tiles.one_row ? 1 : p.q_len,
                        p.kv_len, tiles.by_batch ? x.batch : row, tiles.by_head ? head : row, row},
                       tiles.one_row ? 1 : queries, tiles.bias, kColumns);
}

}  // namespace zenith::attention::hopper
