// Which tiles a block of a persistent kernel works on, and in which order.
#pragma once

#include <cstdint>

namespace zenith::attention::hopper {

/// All tiles of all heads, in sections of heads whose streamed operands fit the L2 cache; in a
/// section, tile 0 of each head, then tile 1, and so on. The kernel numbers tiles so that under a
/// causal mask the longest come first.
///
/// Items are dealt out in rounds of one for each block, every other round backwards: who got the
/// longest of one round gets the shortest of the next. A section begins with a round of its own, so
/// that what differs at its end are its shortest items; with equal items (`rounds` == 0) all
/// follow each other instead.
struct Schedule {
  int tiles, heads, section_heads;  // heads: of all examples
  int rounds;                       // of a section
  int inner;     // examples, where a head of all of them comes before the next; else heads of one
  bool by_head;  // the former

  struct Item {
    int tile, head, batch;  // tile -1: none in this round
  };
  __device__ __forceinline__ int total_rounds() const {
    if (rounds > 0) return (heads + section_heads - 1) / section_heads * rounds;
    const int blocks = gridDim.x;
    return static_cast<int>((int64_t{tiles} * heads + blocks - 1) / blocks);
  }
  __device__ __forceinline__ Item At(int round) const {
    const int blocks = gridDim.x;
    const int block = round % 2 == 0 ? blockIdx.x : blocks - 1 - blockIdx.x;
    int section, index;
    if (rounds > 0) {
      section = round / rounds;
      index = round % rounds * blocks + block;
    } else {
      const int64_t position = int64_t{round} * blocks + block;
      const int size = section_heads * tiles;
      section = static_cast<int>(position / size);
      index = static_cast<int>(position - int64_t{section} * size);
    }
    const int first = section * section_heads, count = min(section_heads, heads - first);
    if (count <= 0 || index >= count * tiles) return {-1, 0, 0};
    const int number = first + index % count, outer = number / inner, rest = number - outer * inner;
    return {index / count, by_head ? outer : rest, by_head ? rest : outer};
  }
};

/// `heads_of_one`: of an example. `head_bytes`: what a head streams. `equal`: whether tiles take
/// equal time. `by_head`: all examples of a head in a row.
inline Schedule MakeSchedule(int64_t tiles, int64_t batch, int64_t heads_of_one, int64_t head_bytes,
                             bool equal, bool by_head, int blocks) {
  const int64_t heads = batch * heads_of_one;
  constexpr int64_t kCacheBytes = 24 << 20;  // about half of an H100's L2: results pass through too
  const int64_t fitting = equal ? 1 : head_bytes > 0 ? kCacheBytes / head_bytes : heads;
  const int64_t section = fitting < 1 ? 1 : fitting < heads ? fitting : heads;
  return {.tiles = static_cast<int>(tiles),
          .heads = static_cast<int>(heads),
          .section_heads = static_cast<int>(section),
          .rounds = equal ? 0 : static_cast<int>((section * tiles + blocks - 1) / blocks),
          .inner = static_cast<int>(by_head ? batch : heads_of_one),
          .by_head = by_head};
}

}  // namespace zenith::attention::hopper
