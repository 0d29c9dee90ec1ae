// How the steps of k are dealt out to the warps that share a tile of columns.
#pragma once

#include <cstdint>

namespace zenith::quantized_linear {

/// In turn, in units of so many steps; a range is what one warp gets.
struct Split {
  int unit, ranges;
  int units, longer;        // of each range; how many ranges have one more
  int last_range, missing;  // whose last unit lacks so many steps
  int units_of_group;
  uint32_t units_of_group_inverse;  // where more than 1: the upper word of its product with a unit
                                    // is the group

  /// Steps of the longest range.
  int Most() const { return unit * (units + (longer > 0)); }
};

/// In units of `unit` steps, which divides group_steps, or group_steps is 0.
inline Split SplitOf(int64_t steps, int64_t ranges, int64_t group_steps, int64_t unit) {
  const int64_t units = (steps + unit - 1) / unit;
  const int64_t units_of_group = group_steps > 0 ? group_steps / unit : 1;
  return {.unit = static_cast<int>(unit),
          .ranges = static_cast<int>(ranges),
          .units = static_cast<int>(units / ranges),
          .longer = static_cast<int>(units % ranges),
          .last_range = static_cast<int>((units - 1) % ranges),
          .missing = static_cast<int>(units * unit - steps),
          .units_of_group = static_cast<int>(units_of_group),
          .units_of_group_inverse =
              static_cast<uint32_t>((uint64_t{1} << 32) / units_of_group + (units_of_group > 1))};
}

/// whole_groups: a unit is a group, so that a warp ends one seldom, or what halves of it keep
/// shares equal. Else at most `unit` steps, so that warps take neighbouring lines.
inline Split EvenSplitOf(int64_t steps, int64_t ranges, int64_t group_steps, bool whole_groups,
                         int64_t unit) {
  const int64_t even = (steps + ranges - 1) / ranges;
  if (group_steps > 0) {
    if (whole_groups) unit = group_steps;
    while (group_steps % unit != 0) --unit;
    while (unit % 2 == 0 && 16 * SplitOf(steps, ranges, group_steps, unit).Most() > 17 * even)
      unit /= 2;
  }
  return SplitOf(steps, ranges, group_steps, unit);
}

}  // namespace zenith::quantized_linear
