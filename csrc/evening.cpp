#include "evening.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace dpofast {
namespace {

// Limit on the bitset words that fill_tightly processes, which takes tens of milliseconds.
constexpr int64_t kTightWords = int64_t{1} << 26;

int64_t largest(const Bins& bins) { return *std::max_element(bins.loads.begin(), bins.loads.end()); }

std::vector<std::vector<int64_t>> members_of(const Bins& bins) {
  std::vector<std::vector<int64_t>> members(bins.loads.size());
  for (size_t i = 0; i < bins.bin_of.size(); ++i) members[bins.bin_of[i]].push_back(i);
  return members;
}

// Returns the subset of `items` (indices into sizes) with the largest sum of at most `room`. Keeps one bit for every
// reachable sum; `last` is the item that reached it first, from which the items of a sum are traced back.
std::vector<int64_t> fullest_subset(const std::vector<int64_t>& sizes, const std::vector<int64_t>& items,
                                    int64_t room) {
  const int64_t words = room / 64 + 1;
  std::vector<uint64_t> reached(words, 0);
  std::vector<int64_t> last(words * 64, -1);
  reached[0] = 1;
  for (const int64_t item : items) {
    const int64_t size = sizes[item], skip = size / 64, shift = size % 64;
    if (size > room) continue;
    for (int64_t w = words - 1; w >= skip; --w) {
      uint64_t moved = reached[w - skip] << shift;
      if (shift && w > skip) moved |= reached[w - skip - 1] >> (64 - shift);
      for (uint64_t fresh = moved & ~reached[w]; fresh != 0; fresh &= fresh - 1) {
        last[w * 64 + __builtin_ctzll(fresh)] = item;
      }
      reached[w] |= moved;
    }
    if (last[room] >= 0) break;
  }
  int64_t sum = room;
  while (sum > 0 && last[sum] < 0) --sum;
  std::vector<int64_t> subset;
  for (; sum > 0; sum -= sizes[last[sum]]) subset.push_back(last[sum]);
  return subset;
}

// Fills one bin after another with the largest remaining item and the subset that fills the rest best. Returns false if
// `count` bins do not suffice.
bool fill_tightly(const std::vector<int64_t>& sizes, int64_t capacity, int64_t count, Bins& bins) {
  const int64_t items = sizes.size();
  if (capacity / 64 + 1 > kTightWords / (items * count)) return false;
  Bins tight{std::vector<int64_t>(items), std::vector<int64_t>(count, 0)};
  std::vector<int64_t> left(items);
  std::iota(left.begin(), left.end(), 0);
  for (int64_t bin = 0; bin < count && !left.empty(); ++bin) {
    const int64_t first = left[0];
    std::vector<int64_t> taken = fullest_subset(sizes, {left.begin() + 1, left.end()}, capacity - sizes[first]);
    taken.push_back(first);
    std::sort(taken.begin(), taken.end());
    for (const int64_t item : taken) {
      tight.bin_of[item] = bin;
      tight.loads[bin] += sizes[item];
    }
    std::vector<int64_t> others;
    std::set_difference(left.begin(), left.end(), taken.begin(), taken.end(), std::back_inserter(others));
    left = std::move(others);
  }
  if (!left.empty()) return false;
  bins = std::move(tight);
  return true;
}

// Returns a packing into no more bins with a lower largest load if one is found, else `bins`.
Bins lower_largest(const Items& items, const Limits& limits, Bins bins) {
  const int64_t count = bins.loads.size();
  const int64_t total = std::accumulate(bins.loads.begin(), bins.loads.end(), int64_t{0});
  const int64_t longest = *std::max_element(items.tokens.begin(), items.tokens.end());
  const bool bounded = !items.targets.empty();
  if (!bounded) {
    Bins spread = least_loaded(items, count);
    exchange(items, spread);
    if (largest(spread) < largest(bins)) bins = std::move(spread);
  }
  // Best-fit with the smallest capacity that needs no more bins, found by bisection to half a percent.
  int64_t low = std::max(longest, (total + count - 1) / count), high = largest(bins);
  while (high - low > low / 200) {
    const int64_t middle = low + (high - low) / 2;
    Bins tighter = best_fit(items, {middle, limits.targets});
    if (static_cast<int64_t>(tighter.loads.size()) <= count) {
      high = largest(tighter);
      bins = std::move(tighter);
    } else {
      low = middle + 1;
    }
  }
  if (!bounded) exchange(items, bins);
  return bins;
}

}  // namespace

Bins least_loaded(const Items& items, int64_t count) {
  Bins bins{std::vector<int64_t>(items.count()), std::vector<int64_t>(count, 0)};
  using Entry = std::pair<int64_t, int64_t>;  // load, bin
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> least;
  for (int64_t bin = 0; bin < count; ++bin) least.emplace(0, bin);
  for (int64_t i = 0; i < items.count(); ++i) {
    const auto [load, bin] = least.top();
    least.pop();
    bins.bin_of[i] = bin;
    bins.loads[bin] = load + items.tokens[i];
    least.emplace(bins.loads[bin], bin);
  }
  return bins;
}

void exchange(const Items& items, Bins& bins) {
  const std::vector<int64_t>& tokens = items.tokens;
  const int64_t count = bins.loads.size();
  std::vector<std::vector<int64_t>> members = members_of(bins);
  // Terminates without the bound, since each turn lowers the largest load or the number of bins with that load; the
  // bound limits the run time.
  for (int64_t turn = 0; turn < 8 * count + 64; ++turn) {
    const int64_t heavy = std::max_element(bins.loads.begin(), bins.loads.end()) - bins.loads.begin();
    const int64_t light = std::min_element(bins.loads.begin(), bins.loads.end()) - bins.loads.begin();
    const int64_t gap = bins.loads[heavy] - bins.loads[light];
    if (gap <= 1) return;
    // The size moved out minus the size moved in should be half the gap. A move without exchange counts as size 0 in.
    int64_t best = gap, goes = -1, comes = -1;
    const auto consider = [&](int64_t out, int64_t back) {
      const int64_t moved = tokens[out] - (back < 0 ? 0 : tokens[back]);
      const int64_t off = std::abs(gap - 2 * moved);
      if (moved > 0 && moved < gap && off < best) best = off, goes = out, comes = back;
    };
    const std::vector<int64_t>& candidates = members[light];
    for (const int64_t out : members[heavy]) {
      const int64_t wanted = tokens[out] - gap / 2;
      const auto after = std::partition_point(candidates.begin(), candidates.end(),
                                              [&](int64_t item) { return tokens[item] > wanted; });
      if (after != candidates.begin()) consider(out, *(after - 1));
      consider(out, after == candidates.end() ? -1 : *after);
    }
    if (goes < 0) return;
    const auto move = [&](int64_t item, int64_t from, int64_t to) {
      auto& left = members[from];
      left.erase(std::lower_bound(left.begin(), left.end(), item));
      members[to].insert(std::lower_bound(members[to].begin(), members[to].end(), item), item);
      bins.bin_of[item] = to;
      bins.loads[from] -= tokens[item];
      bins.loads[to] += tokens[item];
    };
    move(goes, heavy, light);
    if (comes >= 0) move(comes, light, heavy);
  }
}

Bins even_out(const Items& items, const Limits& limits, Bins bins) {
  const int64_t needed = lower_bound(items, limits);
  const bool bounded = !items.targets.empty();
  while (static_cast<int64_t>(bins.loads.size()) > std::max<int64_t>(needed, 1)) {
    const int64_t fewer = bins.loads.size() - 1;
    if (!bounded) {
      Bins spread = least_loaded(items, fewer);
      exchange(items, spread);
      if (largest(spread) <= limits.tokens) {
        bins = std::move(spread);
        continue;
      }
      if (fill_tightly(items.tokens, limits.tokens, fewer, bins)) continue;
    }
    break;
  }
  return bins.loads.size() > 1 ? lower_largest(items, limits, std::move(bins)) : bins;
}

void split_bins(const Items& items, int64_t count, Bins& bins) {
  std::vector<std::vector<int64_t>> members = members_of(bins);
  using Entry = std::pair<int64_t, int64_t>;  // load, -bin of more than one item
  std::priority_queue<Entry> fullest;
  const auto offer = [&](int64_t bin) {
    if (members[bin].size() > 1) fullest.emplace(bins.loads[bin], -bin);
  };
  for (size_t bin = 0; bin < members.size(); ++bin) offer(bin);
  while (static_cast<int64_t>(bins.loads.size()) < count) {
    const int64_t fresh = bins.loads.size();
    bins.loads.push_back(0);
    members.emplace_back();
    if (fullest.empty()) continue;
    const int64_t from = -fullest.top().second;
    fullest.pop();
    std::vector<int64_t> items_there = std::move(members[from]);
    // In descending order of size, each item goes to the lighter half.
    std::sort(items_there.begin(), items_there.end(), [&](int64_t a, int64_t b) {
      return items.tokens[a] != items.tokens[b] ? items.tokens[a] > items.tokens[b] : a < b;
    });
    members[from].clear();
    bins.loads[from] = 0;
    for (const int64_t item : items_there) {
      const int64_t to = bins.loads[fresh] < bins.loads[from] ? fresh : from;
      members[to].push_back(item);
      bins.bin_of[item] = to;
      bins.loads[to] += items.tokens[item];
    }
    offer(from);
    offer(fresh);
  }
}

}  // namespace dpofast
