#include "planner.hpp"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "evening.hpp"
#include "rooms.hpp"

namespace dpofast {
namespace {

// Items in descending order. Planning works on these, so that it does not depend on the input's order.
struct Sorted {
  std::vector<int64_t> order;
  Items items;
};

Sorted in_order(const Items& items, std::vector<int64_t> order) {
  Items taken = take(items, order);
  return {std::move(order), std::move(taken)};
}

// Returns indices by descending tokens, ties by descending targets, and items equal in both in the input's order.
std::vector<int64_t> by_tokens(const Items& items) {
  const int64_t count = items.count();
  const std::vector<int64_t>& tokens = items.tokens;
  const int64_t longest = count ? *std::max_element(tokens.begin(), tokens.end()) : 0;
  std::vector<int64_t> order(count);
  if (items.targets.empty() && longest <= 4 * count + 1024) {
    std::vector<int64_t> next(longest + 2, 0);  // a counting sort
    for (const int64_t size : tokens) ++next[longest - size + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t i = 0; i < count; ++i) order[next[longest - tokens[i]]++] = i;
    return order;
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return tokens[a] != tokens[b] ? tokens[a] > tokens[b]
                                  : !items.targets.empty() && items.targets[a] > items.targets[b];
  });
  return order;
}

// Returns indices by descending share of a limit, for each item the limit that it uses more of.
std::vector<int64_t> by_share(const Items& items, const Limits& limits) {
  std::vector<int64_t> order = by_tokens(items);
  if (items.targets.empty()) return order;
  const auto share = [&](int64_t i) {
    return std::max(static_cast<double>(items.tokens[i]) / limits.tokens,
                    static_cast<double>(items.targets[i]) / limits.targets);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return share(a) > share(b); });
  return order;
}

// Renumbers the bins by descending load and restores the input's order of the items.
Bins in_input_order(const std::vector<int64_t>& order, const Bins& bins) {
  std::vector<int64_t> by_load(bins.loads.size()), rank(bins.loads.size());
  std::iota(by_load.begin(), by_load.end(), 0);
  std::stable_sort(by_load.begin(), by_load.end(), [&](int64_t a, int64_t b) { return bins.loads[a] > bins.loads[b]; });
  Bins result{std::vector<int64_t>(order.size()), {}};
  for (size_t i = 0; i < by_load.size(); ++i) {
    rank[by_load[i]] = i;
    result.loads.push_back(bins.loads[by_load[i]]);
  }
  for (size_t i = 0; i < order.size(); ++i) result.bin_of[order[i]] = rank[bins.bin_of[i]];
  return result;
}

// best_fit for any number of items. With two limits, items are divided into parts of at most kEvenItems with the same
// mixture of sizes, each of which leaves part of one bin unused.
Bins best_fit_shares(const Items& items, const Limits& limits) {
  const int64_t count = items.count(), shares = (count + kEvenItems - 1) / kEvenItems;
  if (items.targets.empty() || shares <= 1) return best_fit(items, limits);
  Bins bins{std::vector<int64_t>(count), {}};
  for (int64_t s = 0; s < shares; ++s) {
    Items share;
    for (int64_t i = s; i < count; i += shares) {
      share.tokens.push_back(items.tokens[i]);
      share.targets.push_back(items.targets[i]);
    }
    const Bins packed = best_fit(share, limits);
    const int64_t first = bins.loads.size();
    for (int64_t i = 0; i < share.count(); ++i) bins.bin_of[s + i * shares] = first + packed.bin_of[i];
    bins.loads.insert(bins.loads.end(), packed.loads.begin(), packed.loads.end());
  }
  return bins;
}

// Packs items in descending order, each of which fits into a bin.
Bins pack_fitting(const Items& items, const Limits& limits) {
  if (items.count() <= kEvenItems) return even_out(items, limits, best_fit(items, limits));
  if (!items.targets.empty() || limits.tokens > BitRooms::kMaxCapacity) {
    return best_fit_shares(items, limits);
  }
  Bins exact = close_exactly(items.tokens, limits.tokens);
  const auto fewest = static_cast<size_t>(lower_bound(items, limits));
  if (exact.loads.size() == fewest) return exact;
  Bins tightest = best_fit(items, limits);
  return tightest.loads.size() < exact.loads.size() ? tightest : exact;
}

template <typename Pack>
Bins pack_sorted(const Items& items, const Limits& limits, Pack pack) {
  const Sorted sorted = in_order(items, by_share(items, limits));
  const int64_t count = items.count();
  // Items beyond a limit have a share above 1 and therefore come first.
  int64_t oversized = 0;
  while (oversized < count && !sorted.items.fits(oversized, limits)) ++oversized;
  if (oversized == 0) return in_input_order(sorted.order, pack(sorted.items, limits));
  Items rest;
  rest.tokens.assign(sorted.items.tokens.begin() + oversized, sorted.items.tokens.end());
  if (!items.targets.empty()) rest.targets.assign(sorted.items.targets.begin() + oversized, sorted.items.targets.end());
  Bins bins = pack(rest, limits);
  for (int64_t i = 0; i < oversized; ++i) {
    bins.bin_of.push_back(bins.loads.size());
    bins.loads.push_back(sorted.items.tokens[i]);
  }
  std::rotate(bins.bin_of.begin(), bins.bin_of.end() - oversized, bins.bin_of.end());
  return in_input_order(sorted.order, bins);
}

}  // namespace

void check_plan_arguments(const Items& items, const Limits& limits, int64_t ranks) {
  check_at_least_one("max_tokens", limits.tokens);
  check_at_least_one("max_targets", limits.targets);
  check_at_least_one("ranks", ranks);
  if (ranks > kMaxRanks) {
    throw PackingError(-1, "ranks: expected at most " + std::to_string(kMaxRanks) + ", got " + std::to_string(ranks));
  }
  if (items.targets.empty() && items.count() && limits.targets != kUnlimited) {
    throw PackingError(-1, "targets: expected one a length with max_targets, got none");
  }
  if (!items.targets.empty() && items.targets.size() != items.tokens.size()) {
    throw PackingError(-1, "targets: expected " + std::to_string(items.tokens.size()) + ", one a length, got " +
                               std::to_string(items.targets.size()));
  }
  const auto check = [](const char* name, const std::vector<int64_t>& sizes) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] >= 1 && sizes[i] <= kMaxPositions) continue;
      throw PackingError(-1, std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(sizes[i]) +
                                 "; expected 1 to " + std::to_string(kMaxPositions));
    }
  };
  check("lengths", items.tokens);
  check("targets", items.targets);
}

Bins best_fit_decreasing(const Items& items, const Limits& limits) {
  return pack_sorted(items, limits, best_fit_shares);
}

Bins pack_evenly(const Items& items, const Limits& limits) { return pack_sorted(items, limits, pack_fitting); }

RankedBins plan_ranks(const Items& items, const Limits& limits, int64_t ranks, bool equal_counts) {
  if (ranks == 1) {
    Bins bins = pack_evenly(items, limits);
    const int64_t count = bins.loads.size();
    return {std::move(bins), {0, count}};
  }
  const Sorted sorted = in_order(items, by_tokens(items));
  Bins shares = least_loaded(sorted.items, ranks);
  if (items.count() <= kEvenItems) exchange(sorted.items, shares);
  shares = in_input_order(sorted.order, shares);

  std::vector<std::vector<int64_t>> owned(ranks);
  for (int64_t i = 0; i < items.count(); ++i) owned[shares.bin_of[i]].push_back(i);
  std::vector<Sorted> parts;
  std::vector<Bins> packed;
  size_t most = 0;
  for (auto& own : owned) {
    parts.push_back(in_order(items, std::move(own)));
    packed.push_back(pack_evenly(parts.back().items, limits));
    most = std::max(most, packed.back().loads.size());
  }
  RankedBins result{{std::vector<int64_t>(items.count()), {}}, {0}};
  for (int64_t r = 0; r < ranks; ++r) {
    Bins& bins = packed[r];
    if (equal_counts && bins.loads.size() < most) {
      split_bins(parts[r].items, most, bins);
      std::vector<int64_t> same(parts[r].order.size());
      std::iota(same.begin(), same.end(), 0);
      bins = in_input_order(same, bins);
    }
    const int64_t first = result.bins.loads.size();
    for (size_t i = 0; i < bins.bin_of.size(); ++i) result.bins.bin_of[parts[r].order[i]] = first + bins.bin_of[i];
    result.bins.loads.insert(result.bins.loads.end(), bins.loads.begin(), bins.loads.end());
    result.rank_bounds.push_back(result.bins.loads.size());
  }
  return result;
}

}  // namespace dpofast
