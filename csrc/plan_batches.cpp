#include <algorithm>
#include <functional>
#include <numeric>
#include <tuple>
#include <utility>

#include "batches.hpp"
#include "prefixes.hpp"

namespace dpofast {
namespace {

// Splits a group that exceeds the limits: appends its units to `units` and sets unit_of. Each unit contains the prompt
// once; comparisons connected by common branches stay together if they fit.
class GroupSplitter {
 public:
  GroupSplitter(const Groups& groups, const Limits& limits)
      : groups_(groups),
        limits_(limits),
        parent_(groups.branches.size()),
        last_piece_(parent_.size(), -1),
        open_piece_(parent_.size(), -1) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }

  void split(std::vector<int64_t>& comparisons, std::vector<int64_t>& unit_of, Items& units) {
    sort_by_content(comparisons);
    for (const int64_t q : comparisons) {
      const auto members = groups_.members_of(q);
      for (const int64_t id : members) parent_[root(id)] = root(members[0]);
    }

    const int64_t prompt_cost = groups_.prompt_cost(groups_.group_of(comparisons[0]));
    const Limits room{limits_.tokens - prompt_cost, limits_.targets};
    std::vector<int64_t> piece_of;
    Items pieces;
    const int64_t first_piece = pieces_;
    for (const int64_t q : comparisons) {
      const auto members = groups_.members_of(q);
      int64_t& open = open_piece_[root(members[0])];
      Cost cost = added_cost(members, open);
      if (open < 0 || (cost.tokens > 0 && pieces.tokens[open - first_piece] + cost.tokens > room.tokens) ||
          (cost.targets > 0 && pieces.targets[open - first_piece] > room.targets - cost.targets)) {
        open = pieces_++;
        pieces.tokens.push_back(0);
        pieces.targets.push_back(0);
        cost = added_cost(members, open);
      }
      pieces.tokens[open - first_piece] += cost.tokens;
      pieces.targets[open - first_piece] += cost.targets;
      for (const int64_t id : members) last_piece_[id] = open;
      piece_of.push_back(open - first_piece);
    }

    if (limits_.targets == kUnlimited) pieces.targets.clear();
    const Bins bins = best_fit_decreasing(pieces, room);
    const int64_t first_unit = units.count();
    std::vector<std::pair<int64_t, int64_t>> contents;  // unit, branch
    for (size_t i = 0; i < comparisons.size(); ++i) {
      const int64_t unit = unit_of[comparisons[i]] = first_unit + bins.bin_of[piece_of[i]];
      for (const int64_t branch : groups_.members_of(comparisons[i])) contents.emplace_back(unit, branch);
    }
    // Two pieces of one component may share a branch and be put into one unit, which is then smaller than the bin's
    // load.
    std::sort(contents.begin(), contents.end());
    contents.erase(std::unique(contents.begin(), contents.end()), contents.end());
    units.tokens.resize(first_unit + bins.loads.size(), prompt_cost);
    units.targets.resize(units.tokens.size(), 0);
    for (const auto& [unit, branch] : contents) {
      units.tokens[unit] += groups_.branch_cost(groups_.branches[branch]);
      units.targets[unit] += groups_.branches[branch].length;
    }
  }

 private:
  struct Cost {
    int64_t tokens = 0, targets = 0;
  };

  // Sorts by content, so that the result does not depend on the order of the examples. The key begins with a
  // comparison's shortest branch: all among the longest branches come before any with a shorter one.
  void sort_by_content(std::vector<int64_t>& comparisons) const {
    using Key = std::pair<int64_t, uint64_t>;
    std::vector<Key> keys;
    std::vector<std::tuple<int64_t, int64_t, int64_t>> keyed;  // begin and end in keys, comparison
    for (const int64_t q : comparisons) {
      const int64_t begin = keys.size();
      for (const int64_t branch : groups_.members_of(q)) {
        keys.emplace_back(-groups_.branches[branch].length, groups_.branches[branch].hash);
      }
      std::sort(keys.begin() + begin, keys.end(), std::greater<>());
      keyed.emplace_back(begin, keys.size(), q);
    }
    std::sort(keyed.begin(), keyed.end(), [&](const auto& a, const auto& b) {
      const auto& [a_begin, a_end, a_comparison] = a;
      const auto& [b_begin, b_end, b_comparison] = b;
      const auto at = [&](int64_t place) { return keys.begin() + place; };
      if (std::equal(at(a_begin), at(a_end), at(b_begin), at(b_end))) return a_comparison < b_comparison;
      return std::lexicographical_compare(at(a_begin), at(a_end), at(b_begin), at(b_end));
    });
    for (size_t i = 0; i < comparisons.size(); ++i) comparisons[i] = std::get<2>(keyed[i]);
  }

  int64_t root(int64_t branch) {
    while (parent_[branch] != branch) branch = parent_[branch] = parent_[parent_[branch]];
    return branch;
  }

  Cost added_cost(const Span<int64_t>& members, int64_t piece) const {
    Cost cost;
    for (const int64_t& id : members) {
      // A list may hold one branch several times, tied.
      if (last_piece_[id] == piece || std::find(members.begin(), &id, id) != &id) continue;
      cost.tokens += groups_.branch_cost(groups_.branches[id]);
      cost.targets += groups_.branches[id].length;
    }
    return cost;
  }

  const Groups& groups_;
  const Limits limits_;
  int64_t pieces_ = 0;
  std::vector<int64_t> parent_;      // union-find over branches
  std::vector<int64_t> last_piece_;  // the piece that a branch was last put into
  std::vector<int64_t> open_piece_;  // for the root of a component: the piece being filled
};

// Rows of each group: its prompt's and those of its branches, with what they share counted once.
std::vector<int64_t> rows_of_groups(const Groups& groups) {
  const int64_t count = groups.prompts.size();
  std::vector<int64_t> rows(count), first(count + 1, 0);
  for (int64_t g = 0; g < count; ++g) rows[g] = groups.prompt_cost(g);
  for (const Branch& branch : groups.branches) {
    rows[branch.group] += groups.branch_cost(branch);
    ++first[branch.group + 1];
  }
  if (groups.share != Share::kPrefix) return rows;
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> members(groups.branches.size());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (size_t b = 0; b < members.size(); ++b) members[next[groups.branches[b].group]++] = b;
  std::vector<Sequence> branches;
  for (int64_t g = 0; g < count; ++g) {
    const auto begin = members.begin() + first[g], end = members.begin() + first[g + 1];
    if (end - begin == 2 && groups.branches[begin[0]].first != groups.branches[begin[1]].first) continue;
    branches.clear();
    for (auto member = begin; member < end; ++member) {
      const Sequence& ids = groups.examples.sequences[groups.branches[*member].sequence];
      branches.push_back({ids.data, ids.length - 1, ids.wide});  // the last token has no row
    }
    const auto common = sort_lexicographically(branches).common;
    rows[g] -= std::accumulate(common.begin(), common.end(), int64_t{0});
  }
  return rows;
}

// Comparisons that are not separated: all of a group, or a part of a group that is too large.
struct Units {
  Items sizes;
  std::vector<int64_t> of;      // unit of each comparison
  std::vector<int64_t> groups;  // group of each unit
};

Units make_units(const Groups& groups, const Limits& limits) {
  const int64_t group_count = groups.prompts.size(), count = groups.comparisons();
  Items sizes{rows_of_groups(groups), std::vector<int64_t>(group_count, 0)};
  for (const Branch& branch : groups.branches) sizes.targets[branch.group] += branch.length;

  Units units{{}, std::vector<int64_t>(count), {}};
  std::vector<int64_t> unit_of_group(group_count);
  std::vector<std::vector<int64_t>> large;
  for (int64_t g = 0; g < group_count; ++g) {
    if (sizes.fits(g, limits)) {
      unit_of_group[g] = units.sizes.count();
      units.sizes.tokens.push_back(sizes.tokens[g]);
      units.sizes.targets.push_back(sizes.targets[g]);
      units.groups.push_back(g);
    } else {
      unit_of_group[g] = -1 - static_cast<int64_t>(large.size());
      large.emplace_back();
    }
  }
  for (int64_t q = 0; q < count; ++q) {
    units.of[q] = unit_of_group[groups.group_of(q)];
    if (units.of[q] < 0) large[-1 - units.of[q]].push_back(q);
  }
  if (!large.empty()) {
    GroupSplitter splitter(groups, limits);
    for (auto& comparisons : large) {
      splitter.split(comparisons, units.of, units.sizes);
      units.groups.resize(units.sizes.count(), groups.group_of(comparisons[0]));
    }
  }
  if (limits.targets == kUnlimited) units.sizes.targets.clear();
  return units;
}

std::vector<std::vector<int64_t>> partition(const Units& units, const Bins& bins) {
  std::vector<std::vector<int64_t>> plan(bins.loads.size());
  std::vector<int64_t> counts(plan.size(), 0);
  for (const int64_t unit : units.of) ++counts[bins.bin_of[unit]];
  for (size_t bin = 0; bin < plan.size(); ++bin) plan[bin].reserve(counts[bin]);
  for (size_t q = 0; q < units.of.size(); ++q) plan[bins.bin_of[units.of[q]]].push_back(q);
  return plan;
}

// Bins of items in another order, renumbered to that of the items.
Bins reordered(const Bins& bins, const std::vector<int64_t>& order) {
  Bins result{std::vector<int64_t>(order.size()), bins.loads};
  for (size_t i = 0; i < order.size(); ++i) result.bin_of[order[i]] = bins.bin_of[i];
  return result;
}

int64_t rows_of(const std::vector<Batch>& batches) {
  return std::accumulate(batches.begin(), batches.end(), int64_t{0},
                         [](int64_t sum, const Batch& batch) { return sum + batch.shape.tokens; });
}

// Rows that items in one bin save by sharing beginnings: each the longest that it has in common with an earlier one.
// Items are in lexicographic order, where that is the one before it in its bin; common as of Lexicographic.
int64_t saved_rows(const Bins& bins, const std::vector<int64_t>& common) {
  std::vector<int64_t> last(bins.loads.size(), -1);
  std::vector<int64_t> minima;  // places after which nothing is less, the least first
  int64_t saved = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(common.size()); ++i) {
    while (!minima.empty() && common[minima.back()] >= common[i]) minima.pop_back();
    minima.push_back(i);
    int64_t& before = last[bins.bin_of[i]];
    if (before >= 0) saved += common[*std::upper_bound(minima.begin(), minima.end(), before)];
    before = i;
  }
  return saved;
}

// To let units that begin alike meet is tried where they share this part of all rows.
constexpr int64_t kWorthTrying = 64;

}  // namespace

std::vector<Batch> make_batches(const Groups& groups, const Limits& limits, int64_t threads) {
  const Units units = make_units(groups, limits);
  if (groups.share != Share::kPrefix) {
    return lay_out(groups, partition(units, pack_evenly(units.sizes, limits)), threads);
  }
  // Units in an order that their content alone decides, so that the plan does not depend on that of the examples.
  std::vector<Sequence> prompts;
  for (const int64_t group : units.groups) prompts.push_back(groups.examples.sequences[groups.prompts[group].sequence]);
  const Lexicographic sorted = sort_lexicographically(prompts);
  const Items sizes = take(units.sizes, sorted.order);
  const auto laid_out = [&](const Bins& bins) {
    return lay_out(groups, partition(units, reordered(bins, sorted.order)), threads);
  };
  const Bins plain = pack_evenly(sizes, limits);
  const int64_t shared = std::accumulate(sorted.common.begin(), sorted.common.end(), int64_t{0});
  const int64_t all = std::accumulate(sizes.tokens.begin(), sizes.tokens.end(), int64_t{0});
  if (plain.loads.size() < 2 || shared < all / kWorthTrying) return laid_out(plain);
  const Bins met = pack_by_prefix(sizes, sorted.common, limits);
  if (met.loads.size() > plain.loads.size()) return laid_out(plain);
  bool continued = false;  // a prompt begins with all of another, so that the other's responses may go on like it
  for (size_t i = 1; i < prompts.size(); ++i) continued |= sorted.common[i] == prompts[sorted.order[i - 1]].length;
  if (!continued) return laid_out(saved_rows(met, sorted.common) >= saved_rows(plain, sorted.common) ? met : plain);
  std::vector<Batch> together = laid_out(met), apart = laid_out(plain);
  return std::move(rows_of(together) <= rows_of(apart) ? together : apart);
}

}  // namespace dpofast
