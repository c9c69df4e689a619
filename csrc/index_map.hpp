// A hash map from integers to places, made anew for every micro-batch in memory that is reused. Pure C++17.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "sequences.hpp"

namespace dpofast {

class IndexMap {
 public:
  // Forgets everything, and makes room for that many keys.
  void reset(int64_t keys) {
    size_t slots = 16;
    while (slots < 2 * static_cast<size_t>(keys)) slots *= 2;
    slots_.assign(slots, {0, -1});
  }

  // What is noted for a key, to read or to set; -1 for a key that has nothing.
  int32_t& operator[](uint64_t key) {
    const size_t mask = slots_.size() - 1;
    for (size_t i = mix(0, key) & mask;; i = (i + 1) & mask) {
      if (slots_[i].second < 0) slots_[i].first = key;
      if (slots_[i].first == key) return slots_[i].second;
    }
  }

 private:
  std::vector<std::pair<uint64_t, int32_t>> slots_;
};

}  // namespace dpofast
