// Which tiles a block of a persistent kernel works on, and in which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace zenith::attention::hopper {

/// All tiles of all heads, in sections of heads (SectionHeads); in a section, tile 0 of each head,
/// then tile 1, and so on. The kernel numbers tiles so that under a causal mask the longest come
/// first.
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

/// How much of the longest tile's time blocks stand still at the end of a section of `rounds`
/// rounds, where tiles take from next to no time up to that of the longest: after an even number
/// each block has had as much of the long ones as of the short ones.
inline double IdleAfter(double rounds) {
  if (rounds < 1) return rounds > 0 ? 1 - rounds / 2 : 0;
  return std::fabs(rounds - 2 * std::max(1.0, std::round(rounds / 2))) / rounds;
}

/// How many heads make a section. Their keys should fit the L2 cache, since blocks that are not at
/// the same tile read them at other times, but its tiles must come out even too: sections of 24 MiB
/// are 1.5 rounds of b4 h8 s4096 d256, where a third of the blocks' time was lost (forward 562 us;
/// 407 with 32 MiB), and 2.2 of b4 h16 s4096 d192/128 (572 us; 528 with 40 MiB). Without such a
/// reason larger ones cost: 26 MiB for 24 5 % at b4 h32 s4096 d64 (H100, bfloat16, 11/2026).
inline int64_t SectionHeads(int64_t tiles, int64_t heads, int64_t head_bytes, int blocks) {
  constexpr int64_t kCacheBytes = 24 << 20;  // about half of an H100's L2: results pass through too
  constexpr int64_t kMostCaches = 4, kSteps = 24;  // steps: tried between one and the next
  constexpr double kLeast = 0.04, kCost = 0.1;     // of the time, for leaving that size; for twice
  const int64_t fitting =
      std::clamp<int64_t>(kCacheBytes / std::max<int64_t>(head_bytes, 1), 1, heads);
  const auto rounds_of = [&](int64_t count) { return static_cast<double>(count * tiles) / blocks; };
  int64_t best = fitting;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t section = fitting; section <= std::min(heads, kMostCaches * fitting);
       section += std::max<int64_t>(1, fitting / kSteps)) {
    const double idle = static_cast<double>(heads / section) * IdleAfter(rounds_of(section)) +
                        IdleAfter(rounds_of(heads % section));
    const double caches = static_cast<double>(section) / static_cast<double>(fitting);
    const double cost = section == fitting ? 0 : kLeast + kCost * (caches - 1);
    const double loss = idle / (rounds_of(heads) / 2) + cost;
    if (loss < least) least = loss, best = section;
  }
  return best;
}

/// `heads_of_one`: of an example. `head_bytes`: what a head streams. `equal`: whether tiles take
/// equal time. `by_head`: all examples of a head in a row.
inline Schedule MakeSchedule(int64_t tiles, int64_t batch, int64_t heads_of_one, int64_t head_bytes,
                             bool equal, bool by_head, int blocks) {
  const int64_t heads = batch * heads_of_one;
  const int64_t section = equal ? 1 : SectionHeads(tiles, heads, head_bytes, blocks);
  return {.tiles = static_cast<int>(tiles),
          .heads = static_cast<int>(heads),
          .section_heads = static_cast<int>(section),
          .rounds = equal ? 0 : static_cast<int>((section * tiles + blocks - 1) / blocks),
          .inner = static_cast<int>(by_head ? batch : heads_of_one),
          .by_head = by_head};
}

}  // namespace zenith::attention::hopper
