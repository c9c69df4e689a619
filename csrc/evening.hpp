// Reduces the number of bins and balances their loads after best-fit decreasing. Items are in the planner's descending
// order, and each fits into a bin.
#pragma once

#include "bins.hpp"

namespace dpofast {

// Longest processing time first: puts every item into the bin with the least load so far. Ignores the limits.
Bins least_loaded(const Items& items, int64_t count);

// Lowers the largest load by moving an item to a lighter bin, or exchanging one with it, until that no longer helps.
// Considers tokens only.
void exchange(const Items& items, Bins& bins);

// Repacks into fewer bins if a lower bound allows it and a packing is found, then lowers the largest load.
Bins even_out(const Items& items, const Limits& limits, Bins bins);

// Increases the number of bins to `count` by splitting the fullest ones; with fewer items than bins, some stay empty.
void split_bins(const Items& items, int64_t count, Bins& bins);

}  // namespace dpofast
