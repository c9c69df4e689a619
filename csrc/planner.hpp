// Packs items of given sizes into few bins of balanced load, and distributes them over ranks. Pure C++17.
#pragma once

#include <cstdint>
#include <vector>

#include "bins.hpp"

namespace dpofast {

// Bins are numbered by descending load. Loads depend on the sizes only, not on their order. An item beyond the limits
// has a bin of its own.

// Each rank takes memory of its own; no cluster has more.
constexpr int64_t kMaxRanks = int64_t{1} << 20;

// Throws PackingError for sizes outside [1, 2^31), targets that are not one a length, a limit on targets without
// targets, limits below 1, and ranks outside [1, kMaxRanks].
void check_plan_arguments(const Items& items, const Limits& limits, int64_t ranks);

// Best-fit decreasing without further improvement.
Bins best_fit_decreasing(const Items& items, const Limits& limits);

// For at most kEvenItems items (an optimizer step): best-fit decreasing, other algorithms if it missed the lower bound,
// then a lower largest load with the same number of bins (2000 + 144 becomes 1072 + 1072). For more items (an epoch, in
// which most bins are full): close_exactly or best-fit decreasing, whichever needs fewer bins.
Bins pack_evenly(const Items& items, const Limits& limits);

constexpr int64_t kEvenItems = 8192;

struct RankedBins {
  Bins bins;                         // numbered rank by rank
  std::vector<int64_t> rank_bounds;  // (ranks + 1,): rank r owns bins [rank_bounds[r], rank_bounds[r + 1])
};

// Distributes the items over the ranks by tokens, then packs every rank's items by pack_evenly. With equal_counts every
// rank gets as many bins as the rank that needs most; a bin is empty only if its rank has fewer items than bins.
RankedBins plan_ranks(const Items& items, const Limits& limits, int64_t ranks, bool equal_counts);

}  // namespace dpofast
