#include <algorithm>

#include "bins.hpp"
#include "rooms.hpp"

namespace dpofast {
namespace {

// With two limits the tightest bin by tokens may lack room for the targets: so many are tried before a new one is
// opened, which keeps a million items linear.
constexpr int kTriedBins = 64;

template <typename Rooms>
Bins best_fit_in(const Items& items, const Limits& limits, Rooms open) {
  const int64_t count = items.count();
  const std::vector<int64_t>& tokens = items.tokens;
  const bool bounded = !items.targets.empty();
  Bins bins{std::vector<int64_t>(count), {}};
  std::vector<int64_t> target_room;
  for (int64_t i = 0; i < count;) {
    const int64_t size = tokens[i];
    int64_t room = open.find(size), above = -1, bin = room < 0 ? -1 : open.top(room);
    if (bounded) {
      int tried = 0;
      while (bin >= 0 && target_room[bin] < items.targets[i]) {
        if (++tried == kTriedBins) {
          bin = -1;
          break;
        }
        above = bin;
        bin = open.below(bin);
        if (bin < 0 && (room = open.find(room + 1)) >= 0) {
          above = -1;
          bin = open.top(room);
        }
      }
    }
    if (bin < 0) {
      bin = bins.loads.size();
      room = limits.tokens;
      bins.loads.push_back(0);
      if (bounded) target_room.push_back(limits.targets);
    } else {
      open.remove(room, above);
    }
    // The tightest bin stays the tightest for further items of the same size, until they no longer fit.
    do {
      if (bounded) target_room[bin] -= items.targets[i];
      bins.bin_of[i++] = bin;
      bins.loads[bin] += size;
      room -= size;
    } while (!bounded && i < count && tokens[i] == size && size <= room);
    if (bounded || room >= tokens.back()) open.push(room, bin);
  }
  return bins;
}

}  // namespace

Bins best_fit(const Items& items, const Limits& limits) {
  if (items.count() == 0) return {};
  const bool bits = limits.tokens <= BitRooms::kMaxCapacity && limits.tokens / 64 <= items.count();
  return bits ? best_fit_in(items, limits, BitRooms(limits.tokens))
              : best_fit_in(items, limits, TreeRooms(limits.tokens));
}

int64_t lower_bound(const Items& items, const Limits& limits) {
  const auto needed = [](const std::vector<int64_t>& sizes, int64_t limit) {
    int64_t sum = 0, large = 0;  // no two items above half of a bin share one
    for (const int64_t size : sizes) {
      sum += size;
      large += size > limit / 2;
    }
    return std::max(sum == 0 ? 0 : (sum - 1) / limit + 1, large);
  };
  return std::max(needed(items.tokens, limits.tokens), needed(items.targets, limits.targets));
}

}  // namespace dpofast
