#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "batches.hpp"

namespace dpofast {
namespace {

// Splits a group that exceeds the limits: appends its units to `units` and sets unit_of_pair. Each unit contains the
// prompt once; pairs connected by common branches stay together if they fit.
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

  void split(std::vector<int64_t>& pairs, std::vector<int64_t>& unit_of_pair, Items& units) {
    sort_by_content(pairs);
    for (const int64_t q : pairs) parent_[root(groups_.pairs[q].chosen)] = root(groups_.pairs[q].rejected);

    const int64_t prompt_cost = groups_.prompt_cost(groups_.branches[groups_.pairs[pairs[0]].chosen].group);
    const Limits room{limits_.tokens - prompt_cost, limits_.targets};
    std::vector<int64_t> piece_of_pair;
    Items pieces;
    const int64_t first_piece = pieces_;
    for (const int64_t q : pairs) {
      const Pair& pair = groups_.pairs[q];
      int64_t& open = open_piece_[root(pair.chosen)];
      Cost cost = added_cost(pair, open);
      if (open < 0 || (cost.tokens > 0 && pieces.tokens[open - first_piece] + cost.tokens > room.tokens) ||
          (cost.targets > 0 && pieces.targets[open - first_piece] > room.targets - cost.targets)) {
        open = pieces_++;
        pieces.tokens.push_back(0);
        pieces.targets.push_back(0);
        cost = added_cost(pair, open);
      }
      pieces.tokens[open - first_piece] += cost.tokens;
      pieces.targets[open - first_piece] += cost.targets;
      last_piece_[pair.chosen] = last_piece_[pair.rejected] = open;
      piece_of_pair.push_back(open - first_piece);
    }

    if (limits_.targets == kUnlimited) pieces.targets.clear();
    const Bins bins = best_fit_decreasing(pieces, room);
    const int64_t first_unit = units.count();
    std::vector<std::pair<int64_t, int64_t>> members;  // unit, branch
    for (size_t i = 0; i < pairs.size(); ++i) {
      const Pair& pair = groups_.pairs[pairs[i]];
      const int64_t unit = unit_of_pair[pairs[i]] = first_unit + bins.bin_of[piece_of_pair[i]];
      for (const int64_t branch : {pair.chosen, pair.rejected}) members.emplace_back(unit, branch);
    }
    // Two pieces of one component may share a branch and be put into one unit, which is then smaller than the bin's
    // load.
    std::sort(members.begin(), members.end());
    members.erase(std::unique(members.begin(), members.end()), members.end());
    units.tokens.resize(first_unit + bins.loads.size(), prompt_cost);
    units.targets.resize(units.tokens.size(), 0);
    for (const auto& [unit, branch] : members) {
      units.tokens[unit] += groups_.branch_cost(groups_.branches[branch]);
      units.targets[unit] += groups_.length(groups_.branches[branch].sequence);
    }
  }

 private:
  struct Cost {
    int64_t tokens = 0, targets = 0;
  };

  // Sorts by content, so that the result does not depend on the order of the examples. The key begins with a pair's
  // shorter branch: all pairs among the longest branches come before any pair with a shorter one.
  void sort_by_content(std::vector<int64_t>& pairs) const {
    using Key = std::pair<int64_t, uint64_t>;
    const auto key = [&](int64_t branch) {
      return Key(-groups_.length(groups_.branches[branch].sequence), groups_.branches[branch].hash);
    };
    std::vector<std::tuple<Key, Key, int64_t>> keyed;
    keyed.reserve(pairs.size());
    for (const int64_t q : pairs) {
      const Key chosen = key(groups_.pairs[q].chosen), rejected = key(groups_.pairs[q].rejected);
      keyed.emplace_back(std::max(chosen, rejected), std::min(chosen, rejected), q);
    }
    std::sort(keyed.begin(), keyed.end());
    for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = std::get<2>(keyed[i]);
  }

  int64_t root(int64_t branch) {
    while (parent_[branch] != branch) branch = parent_[branch] = parent_[parent_[branch]];
    return branch;
  }

  Cost added_cost(const Pair& pair, int64_t piece) const {
    Cost cost;
    for (const int64_t id : {pair.chosen, pair.rejected}) {
      if (last_piece_[id] == piece) continue;
      cost.tokens += groups_.branch_cost(groups_.branches[id]);
      cost.targets += groups_.length(groups_.branches[id].sequence);
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

}  // namespace

std::vector<std::vector<int64_t>> plan_batches(const Groups& groups, const Limits& limits) {
  const int64_t group_count = groups.prompts.size(), pair_count = groups.pairs.size();
  const auto group_of = [&](int64_t q) { return groups.branches[groups.pairs[q].chosen].group; };
  Items sizes{std::vector<int64_t>(group_count), std::vector<int64_t>(group_count, 0)};
  for (int64_t g = 0; g < group_count; ++g) sizes.tokens[g] = groups.prompt_cost(g);
  for (const Branch& branch : groups.branches) {
    sizes.tokens[branch.group] += groups.branch_cost(branch);
    sizes.targets[branch.group] += groups.length(branch.sequence);
  }

  // A unit is not split by the global plan: a whole group, or a part of a group that is too large.
  Items units;
  std::vector<int64_t> unit_of_group(group_count), unit_of_pair(pair_count);
  std::vector<std::vector<int64_t>> large;
  for (int64_t g = 0; g < group_count; ++g) {
    if (sizes.fits(g, limits)) {
      unit_of_group[g] = units.count();
      units.tokens.push_back(sizes.tokens[g]);
      units.targets.push_back(sizes.targets[g]);
    } else {
      unit_of_group[g] = -1 - static_cast<int64_t>(large.size());
      large.emplace_back();
    }
  }
  for (int64_t q = 0; q < pair_count; ++q) {
    unit_of_pair[q] = unit_of_group[group_of(q)];
    if (unit_of_pair[q] < 0) large[-1 - unit_of_pair[q]].push_back(q);
  }
  if (!large.empty()) {
    GroupSplitter splitter(groups, limits);
    for (auto& pairs : large) splitter.split(pairs, unit_of_pair, units);
  }

  if (limits.targets == kUnlimited) units.targets.clear();
  const Bins bins = pack_evenly(units, limits);
  std::vector<std::vector<int64_t>> plan(bins.loads.size());
  for (int64_t q = 0; q < pair_count; ++q) plan[bins.bin_of[unit_of_pair[q]]].push_back(q);
  return plan;
}

}  // namespace dpofast
