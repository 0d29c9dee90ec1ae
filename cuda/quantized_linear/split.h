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
};

/// group_steps: of a group, or 0. whole_groups: units of whole groups, where shares stay equal: a
/// warp then ends a group seldom. Else units of at most `unit` steps, so that warps take
/// neighbouring lines.
inline Split SplitOf(int64_t steps, int64_t ranges, int64_t group_steps, bool whole_groups,
                     int64_t unit) {
  const int64_t even = (steps + ranges - 1) / ranges;
  if (group_steps > 0) {
    if (whole_groups) unit = group_steps;
    while (group_steps % unit != 0) --unit;
    const auto most = [&] { return (steps + unit * ranges - 1) / (unit * ranges) * unit; };
    while (unit % 2 == 0 && 16 * most() > 17 * even) unit /= 2;
  }
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

}  // namespace zenith::quantized_linear
