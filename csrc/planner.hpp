// Items of given sizes into as few bins of one capacity as can be found, and evenly filled. Pure C++17.
#pragma once

#include <cstdint>
#include <vector>

namespace dpofast {

// Items assigned to bins; bins are numbered by descending load. Loads depend on the sizes alone, not on their order.
struct Bins {
  std::vector<int64_t> bin_of;
  std::vector<int64_t> loads;
};

// Best-fit decreasing in O(n log n). An item larger than the capacity gets a bin of its own.
Bins best_fit_decreasing(const std::vector<int64_t>& sizes, int64_t capacity);

// best_fit_decreasing, and then the same number of bins (or fewer) with a smaller largest load: 2000 + 144 becomes
// 1072 + 1072. For the items of an optimizer step; more than kEvenItems are left as they are, since many bins are full
// bins.
Bins pack_evenly(const std::vector<int64_t>& sizes, int64_t capacity);

constexpr int64_t kEvenItems = 8192;

}  // namespace dpofast
