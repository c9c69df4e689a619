// Items of given sizes into as few bins as can be found, evenly filled, and balanced over ranks. Pure C++17.
#pragma once

#include <cstdint>
#include <vector>

#include "bins.hpp"

namespace dpofast {

// Bins are numbered by descending load, and loads depend on the sizes alone, not on their order. An item beyond the
// limits has a bin of its own.

// Refuses sizes outside [1, 2^31).
void check_items(const Items& items);

// Best-fit decreasing, nothing more.
Bins best_fit_decreasing(const Items& items, const Limits& limits);

// At most kEvenItems items (an optimizer step): best-fit decreasing, then other ways where it missed the lower bound,
// and the same number of bins with a smaller largest load (2000 + 144 becomes 1072 + 1072). More items (an epoch, where
// many bins are full bins): the fewer bins of close_exactly and best-fit decreasing.
Bins pack_evenly(const Items& items, const Limits& limits);

constexpr int64_t kEvenItems = 8192;

struct RankedBins {
  Bins bins;                         // numbered rank by rank
  std::vector<int64_t> rank_bounds;  // (ranks + 1,): rank r owns bins [rank_bounds[r], rank_bounds[r + 1])
};

// Spreads the items over the ranks by tokens, then packs every rank's share evenly. With equal_counts all ranks get as
// many bins as the one that needs most; a bin is empty only where a rank has fewer items than that.
RankedBins plan_ranks(const Items& items, const Limits& limits, int64_t ranks, bool equal_counts);

}  // namespace dpofast
