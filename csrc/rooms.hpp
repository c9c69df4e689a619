// Indexes of open bins by free room, which find the tightest bin with at least a given room.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace dpofast {

// For free room in [0, capacity]: one stack of bins per value, and a tree of bits over the occupied values. A word
// covers 64 values, a word of the next level 64 words, up to a single root. Finding and updating access one word per
// level (three levels up to 262,143), where a balanced tree visits log2(number of bins) nodes.
class BitRooms {
 public:
  // Largest capacity this is used for; bits and stacks take 10 bytes per unit of capacity.
  static constexpr int64_t kMaxCapacity = int64_t{1} << 24;

  explicit BitRooms(int64_t capacity) : top_(capacity + 1, -1) {
    int64_t words = capacity + 1;
    do {
      words = (words + 63) / 64;
      levels_.emplace_back(words, 0);
    } while (words > 1);
  }

  // The least occupied room of at least `room`, or -1.
  int64_t find(int64_t room) const {
    if (room >= static_cast<int64_t>(top_.size())) return -1;
    // Go up until a word has a bit at or after the position, then down along the first set bits.
    int64_t place = room;
    for (size_t level = 0; level < levels_.size(); ++level) {
      const int64_t word = place / 64;
      if (word >= static_cast<int64_t>(levels_[level].size())) return -1;
      const uint64_t bits = levels_[level][word] >> (place % 64);
      if (bits != 0) {
        place += __builtin_ctzll(bits);
        while (level > 0) {
          --level;
          place = place * 64 + __builtin_ctzll(levels_[level][place]);
        }
        return place;
      }
      place = word + 1;
    }
    return -1;
  }

  // The bin last pushed with this room; below(bin) is the one pushed before it, -1 at the end.
  int64_t top(int64_t room) const { return top_[room]; }
  int64_t below(int64_t bin) const { return below_[bin]; }

  void push(int64_t room, int64_t bin) {
    if (bin >= static_cast<int64_t>(below_.size())) below_.resize(bin + 1);
    below_[bin] = top_[room];
    if (top_[room] < 0) {
      int64_t place = room;
      for (auto& level : levels_) {
        const bool occupied = level[place / 64] != 0;
        level[place / 64] |= uint64_t{1} << (place % 64);
        if (occupied) break;
        place /= 64;
      }
    }
    top_[room] = static_cast<int32_t>(bin);
  }

  // Removes the bin directly below `above` (-1: the top one).
  void remove(int64_t room, int64_t above) {
    if (above >= 0) {
      below_[above] = below_[below_[above]];
      return;
    }
    top_[room] = below_[top_[room]];
    if (top_[room] >= 0) return;
    int64_t place = room;
    for (auto& level : levels_) {
      level[place / 64] &= ~(uint64_t{1} << (place % 64));
      if (level[place / 64] != 0) break;
      place /= 64;
    }
  }

 private:
  std::vector<int32_t> top_, below_;
  std::vector<std::vector<uint64_t>> levels_;
};

// The same operations for capacities too large for one bit per value, or for few bins.
class TreeRooms {
 public:
  explicit TreeRooms(int64_t) {}

  int64_t find(int64_t room) const {
    const auto found = stacks_.lower_bound(room);
    return found == stacks_.end() ? -1 : found->first;
  }
  int64_t top(int64_t room) const { return stacks_.at(room); }
  int64_t below(int64_t bin) const { return below_[bin]; }

  void push(int64_t room, int64_t bin) {
    if (bin >= static_cast<int64_t>(below_.size())) below_.resize(bin + 1);
    const auto [place, added] = stacks_.try_emplace(room, -1);
    below_[bin] = place->second;
    place->second = bin;
  }

  void remove(int64_t room, int64_t above) {
    if (above >= 0) {
      below_[above] = below_[below_[above]];
      return;
    }
    const auto place = stacks_.find(room);
    place->second = below_[place->second];
    if (place->second < 0) stacks_.erase(place);
  }

 private:
  std::map<int64_t, int64_t> stacks_;
  std::vector<int64_t> below_;
};

}  // namespace dpofast
