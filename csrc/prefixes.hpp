// Token sequences in lexicographic order, and items packed so that those that begin alike meet in one bin. Pure C++17.
#pragma once

#include <cstdint>
#include <vector>

#include "planner.hpp"
#include "sequences.hpp"

namespace dpofast {

struct Lexicographic {
  std::vector<int64_t> order;  // indices, ascending by content; equal sequences in order of index
  std::vector<int64_t>
      common;  // common[i]: tokens that sequences order[i] and order[i - 1] begin with alike; 0 for i = 0
};

// Sorts sequences of ids in [0, kTokenIds). Reads each token up to where sequences part about once.
Lexicographic sort_lexicographically(const std::vector<Sequence>& sequences);

// Packs items, each of which begins with a sequence whose tokens are paid once a bin by all items that begin alike.
// Sizes include all of an item's tokens. Items and `sorted` are in lexicographic order: item i is sequence
// sorted.order[i]. Loads count what is shared once.
Bins pack_by_prefix(const Items& items, const std::vector<int64_t>& common, const Limits& limits);

}  // namespace dpofast
