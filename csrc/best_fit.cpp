#include <algorithm>

#include "bins.hpp"
#include "rooms.hpp"

namespace dpofast {
namespace {

// One limit: the sizes of all items and the capacity of a bin. `sizes` is empty if there is no such limit.
struct Bound {
  const std::vector<int64_t>& sizes;
  int64_t limit;

  double share() const {
    double sum = 0;
    for (const int64_t size : sizes) sum += static_cast<double>(size);
    return sum / static_cast<double>(limit);
  }
};

// Returns the bin of each item. Free room is indexed for the first bound; the second is checked bin by bin.
template <typename Rooms>
std::vector<int64_t> best_fit_in(const Bound& first, const Bound& second, Rooms open) {
  const int64_t count = first.sizes.size();
  const bool bounded = !second.sizes.empty();
  const int64_t least = *std::min_element(first.sizes.begin(), first.sizes.end());
  std::vector<int64_t> bin_of(count), second_room;
  int64_t bins = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t size = first.sizes[i];
    int64_t room = open.find(size), above = -1, bin = room < 0 ? -1 : open.top(room);
    while (bounded && bin >= 0 && second_room[bin] < second.sizes[i]) {
      above = bin;
      bin = open.below(bin);
      if (bin < 0 && (room = open.find(room + 1)) >= 0) {
        above = -1;
        bin = open.top(room);
      }
    }
    if (bin >= 0) {
      open.remove(room, above);
    } else {
      bin = bins++;
      room = first.limit;
      if (bounded) second_room.push_back(second.limit);
    }
    // The tightest bin remains the tightest for further items of the same size, until they no longer fit.
    do {
      if (bounded) second_room[bin] -= second.sizes[i];
      bin_of[i++] = bin;
      room -= size;
    } while (!bounded && i < count && first.sizes[i] == size && size <= room);
    if (room >= least) open.push(room, bin);
  }
  return bin_of;
}

}  // namespace

Bins best_fit(const Items& items, const Limits& limits) {
  if (items.count() == 0) return {};
  const Bound tokens{items.tokens, limits.tokens}, targets{items.targets, limits.targets};
  // Index the free room of the scarcer bound, so that bins that it has filled are not searched again.
  const bool by_targets = targets.share() > tokens.share();
  const Bound &first = by_targets ? targets : tokens, &second = by_targets ? tokens : targets;
  const bool bits = first.limit <= BitRooms::kMaxCapacity && first.limit / 64 <= items.count();
  Bins bins{
      bits ? best_fit_in(first, second, BitRooms(first.limit)) : best_fit_in(first, second, TreeRooms(first.limit)),
      {}};
  bins.loads.assign(*std::max_element(bins.bin_of.begin(), bins.bin_of.end()) + 1, 0);
  for (int64_t i = 0; i < items.count(); ++i) bins.loads[bins.bin_of[i]] += items.tokens[i];
  return bins;
}

int64_t lower_bound(const Items& items, const Limits& limits) {
  const auto needed = [](const std::vector<int64_t>& sizes, int64_t limit) {
    int64_t sum = 0, large = 0;  // no two items above half of a bin fit together
    for (const int64_t size : sizes) {
      sum += size;
      large += size > limit / 2;
    }
    return std::max(sum == 0 ? 0 : (sum - 1) / limit + 1, large);
  };
  return std::max(needed(items.tokens, limits.tokens), needed(items.targets, limits.targets));
}

}  // namespace dpofast
