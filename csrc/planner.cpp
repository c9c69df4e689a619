#include "planner.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <set>
#include <tuple>
#include <utility>

namespace dpofast {
namespace {

// Sizes in descending order: everything is planned on them, so that the input's order cannot matter.
struct Sorted {
  std::vector<int64_t> order, sizes;
};

Sorted sort_descending(const std::vector<int64_t>& sizes) {
  Sorted sorted{std::vector<int64_t>(sizes.size()), {}};
  std::iota(sorted.order.begin(), sorted.order.end(), 0);
  std::stable_sort(sorted.order.begin(), sorted.order.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
  for (const int64_t item : sorted.order) sorted.sizes.push_back(sizes[item]);
  return sorted;
}

Bins best_fit(const std::vector<int64_t>& sizes, int64_t capacity) {
  const int64_t count = sizes.size();
  Bins bins{std::vector<int64_t>(count), {}};
  std::set<std::pair<int64_t, int64_t>> open;  // room left, bin
  for (int64_t i = 0; i < count;) {
    const int64_t size = sizes[i];
    int64_t room = capacity, bin = bins.loads.size();
    const auto tightest = open.lower_bound({size, 0});
    if (tightest == open.end()) {
      bins.loads.push_back(0);
    } else {
      std::tie(room, bin) = *tightest;
      open.erase(tightest);
    }
    // The tightest bin stays the tightest for further items of the same size, until they no longer fit.
    do {
      bins.bin_of[i++] = bin;
      bins.loads[bin] += size;
      room -= size;
    } while (i < count && sizes[i] == size && size <= room);
    if (room >= 0) open.insert({room, bin});
  }
  return bins;
}

// Longest processing time first: every item into the bin with the least load so far.
Bins least_loaded(const std::vector<int64_t>& sizes, int64_t count) {
  Bins bins{std::vector<int64_t>(sizes.size()), std::vector<int64_t>(count, 0)};
  using Entry = std::pair<int64_t, int64_t>;  // load, bin
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> least;
  for (int64_t bin = 0; bin < count; ++bin) least.emplace(0, bin);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto [load, bin] = least.top();
    least.pop();
    bins.bin_of[i] = bin;
    bins.loads[bin] = load + sizes[i];
    least.emplace(load + sizes[i], bin);
  }
  return bins;
}

int64_t largest(const Bins& bins) { return *std::max_element(bins.loads.begin(), bins.loads.end()); }

// The best of `bins`, least_loaded, and best_fit at the least capacity (found by bisection) that needs no more bins.
Bins even_out(const std::vector<int64_t>& sizes, Bins bins) {
  const int64_t count = bins.loads.size(), total = std::accumulate(bins.loads.begin(), bins.loads.end(), int64_t{0});
  Bins spread = least_loaded(sizes, count);
  if (largest(spread) < largest(bins)) bins = std::move(spread);
  int64_t low = std::max(sizes[0], (total + count - 1) / count), high = largest(bins);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    Bins tighter = best_fit(sizes, middle);
    if (static_cast<int64_t>(tighter.loads.size()) <= count) {
      bins = std::move(tighter);
      high = largest(bins);
    } else {
      low = middle + 1;
    }
  }
  return bins;
}

// Numbers the bins by descending load and undoes the sorting of the items.
Bins in_input_order(const Sorted& sorted, const Bins& bins) {
  std::vector<int64_t> by_load(bins.loads.size()), rank(bins.loads.size());
  std::iota(by_load.begin(), by_load.end(), 0);
  std::stable_sort(by_load.begin(), by_load.end(),
                   [&](int64_t a, int64_t b) { return bins.loads[a] > bins.loads[b]; });
  Bins result{std::vector<int64_t>(sorted.order.size()), {}};
  for (size_t i = 0; i < by_load.size(); ++i) {
    rank[by_load[i]] = i;
    result.loads.push_back(bins.loads[by_load[i]]);
  }
  for (size_t i = 0; i < sorted.order.size(); ++i) result.bin_of[sorted.order[i]] = rank[bins.bin_of[i]];
  return result;
}

}  // namespace

Bins best_fit_decreasing(const std::vector<int64_t>& sizes, int64_t capacity) {
  const Sorted sorted = sort_descending(sizes);
  return in_input_order(sorted, best_fit(sorted.sizes, capacity));
}

Bins pack_evenly(const std::vector<int64_t>& sizes, int64_t capacity) {
  const Sorted sorted = sort_descending(sizes);
  Bins bins = best_fit(sorted.sizes, capacity);
  const int64_t count = sizes.size();
  if (count > kEvenItems) return in_input_order(sorted, bins);

  // Oversized items keep their own bins, which best_fit numbered first.
  const int64_t oversized = std::partition_point(sorted.sizes.begin(), sorted.sizes.end(),
                                                 [&](int64_t size) { return size > capacity; }) -
                            sorted.sizes.begin();
  Bins rest{{}, {bins.loads.begin() + oversized, bins.loads.end()}};
  for (int64_t i = oversized; i < count; ++i) rest.bin_of.push_back(bins.bin_of[i] - oversized);
  const std::vector<int64_t> sizes_of_rest(sorted.sizes.begin() + oversized, sorted.sizes.end());
  while (rest.loads.size() > 1) {
    rest = even_out(sizes_of_rest, std::move(rest));
    // The two least loaded bins may fit into one, which best-fit decreasing alone never leaves.
    std::vector<int64_t> by_load(rest.loads.size());
    std::iota(by_load.begin(), by_load.end(), 0);
    std::stable_sort(by_load.begin(), by_load.end(), [&](int64_t a, int64_t b) { return rest.loads[a] < rest.loads[b]; });
    const int64_t into = by_load[0], from = by_load[1], last = rest.loads.size() - 1;
    if (rest.loads[into] > capacity - rest.loads[from]) break;
    rest.loads[into] += rest.loads[from];
    rest.loads[from] = rest.loads[last];
    rest.loads.pop_back();
    for (int64_t& bin : rest.bin_of) {
      if (bin == from) bin = into;
      if (bin == last) bin = from;
    }
  }
  bins.loads.resize(oversized);
  bins.loads.insert(bins.loads.end(), rest.loads.begin(), rest.loads.end());
  for (int64_t i = oversized; i < count; ++i) bins.bin_of[i] = rest.bin_of[i - oversized] + oversized;
  return in_input_order(sorted, bins);
}

}  // namespace dpofast
