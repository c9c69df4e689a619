// Fewer and evener bins than best-fit decreasing leaves. Items come in the planner's descending order, and all fit.
#pragma once

#include "bins.hpp"

namespace dpofast {

// Longest processing time first: every item into the bin with the least load so far. Knows no limits.
Bins least_loaded(const Items& items, int64_t count);

// Lowers the largest load by moving an item, or exchanging two, with a lighter bin, until no such exchange lowers it.
// Looks at tokens alone.
void exchange(const Items& items, Bins& bins);

// Packs into fewer bins where a lower bound allows it and a way is found, and then lowers the largest load.
Bins even_out(const Items& items, const Limits& limits, Bins bins);

// Makes it `count` bins by splitting the fullest ones; bins stay empty where there are fewer items than bins.
void split_bins(const Items& items, int64_t count, Bins& bins);

}  // namespace dpofast
