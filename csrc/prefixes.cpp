#include "prefixes.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace dpofast {
namespace {

// Two tokens as one number that sorts like them; the end of a sequence comes before every token.
uint64_t key_at(const Sequence& sequence, int64_t place) {
  const auto half = [&](int64_t i) -> uint64_t { return i < sequence.length ? sequence[i] + 1 : 0; };
  return half(place) << 32 | half(place + 1);
}

// Items that are in one bin so far, as a list through Packing::next_.
struct Part {
  int64_t tokens, targets;  // tokens with all that is shared inside counted once
  int64_t first, last;
};

// A run of consecutive items that begin with the same `depth` tokens.
struct Open {
  int64_t depth;
  std::vector<Part> parts;
};

// To meet in one bin must save this share of the rows: parts that are put together are harder to pack.
constexpr int64_t kWorthwhile = 32;

class Packing {
 public:
  Packing(const Items& items, const std::vector<int64_t>& common, const Limits& limits)
      : items_(items), common_(common), limits_(limits), next_(items.count(), -1) {}

  Bins pack() {
    const int64_t count = items_.count();
    const int64_t shared = count > 1 ? *std::min_element(common_.begin() + 1, common_.end()) : 0;
    // Runs are closed from the deepest: `open_` has ascending depths, that of the whole first.
    open_.push_back({shared < limits_.tokens ? shared : 0, {}});
    for (int64_t i = 0; i < count; ++i) {
      const Part part{items_.tokens[i], items_.targets.empty() ? 0 : items_.targets[i], i, i};
      const int64_t depth = i + 1 < count ? common_[i + 1] : open_[0].depth;
      if (depth > open_.back().depth && depth < limits_.tokens) open_.push_back({depth, {}});
      open_.back().parts.push_back(part);
      while (open_.size() > 1 && open_.back().depth > depth) close(depth);
    }
    while (open_.size() > 1) close(open_[0].depth);
    const Open& whole = open_[0];
    const Bins bins = pack_evenly(beyond(whole.parts, whole.depth), room(whole.depth));
    Bins result{std::vector<int64_t>(count), bins.loads};
    for (int64_t& load : result.loads) load += whole.depth;
    for (size_t p = 0; p < whole.parts.size(); ++p) {
      for (int64_t i = whole.parts[p].first; i >= 0; i = next_[i]) result.bin_of[i] = bins.bin_of[p];
    }
    return result;
  }

 private:
  // Closes the deepest run, when the next item shares `depth` tokens with it: hands its parts up, put together where
  // they fit and where that saves enough.
  void close(int64_t depth) {
    Open run = std::move(open_.back());
    open_.pop_back();
    const int64_t above = std::max(depth, open_.back().depth);
    if (above > open_.back().depth) open_.push_back({above, {}});
    std::vector<Part>& target = open_.back().parts;
    // One beyond the limits has a bin of its own, whatever the others do.
    const auto fitting = std::stable_partition(run.parts.begin(), run.parts.end(), [&](const Part& part) {
      return part.tokens > limits_.tokens || part.targets > limits_.targets;
    });
    target.insert(target.end(), run.parts.begin(), fitting);
    run.parts.erase(run.parts.begin(), fitting);
    int64_t tokens = 0;
    for (const Part& part : run.parts) tokens += part.tokens - above;
    const int64_t saved = (run.depth - above) * (static_cast<int64_t>(run.parts.size()) - 1);
    if (saved == 0 || saved < tokens / kWorthwhile) {
      target.insert(target.end(), run.parts.begin(), run.parts.end());
      return;
    }
    const Bins bins = best_fit_decreasing(beyond(run.parts, run.depth), room(run.depth));
    std::vector<Part> merged(bins.loads.size(), Part{run.depth, 0, -1, -1});
    for (size_t p = 0; p < run.parts.size(); ++p) {
      const Part& part = run.parts[p];
      Part& into = merged[bins.bin_of[p]];
      into.tokens += part.tokens - run.depth;
      into.targets += part.targets;
      (into.last < 0 ? into.first : next_[into.last]) = part.first;
      into.last = part.last;
    }
    target.insert(target.end(), merged.begin(), merged.end());
  }

  // Sizes of parts in a bin whose first `depth` tokens are there already.
  Items beyond(const std::vector<Part>& parts, int64_t depth) const {
    Items sizes;
    for (const Part& part : parts) {
      sizes.tokens.push_back(part.tokens - depth);
      if (!items_.targets.empty()) sizes.targets.push_back(part.targets);
    }
    return sizes;
  }

  Limits room(int64_t depth) const {
    return {limits_.tokens == kUnlimited ? kUnlimited : limits_.tokens - depth, limits_.targets};
  }

  const Items& items_;
  const std::vector<int64_t>& common_;
  const Limits limits_;
  std::vector<int64_t> next_;  // the next item in the same part, or -1
  std::vector<Open> open_;
};

}  // namespace

Lexicographic sort_lexicographically(const std::vector<Sequence>& sequences) {
  const int64_t count = sequences.size();
  Lexicographic sorted{std::vector<int64_t>(count), std::vector<int64_t>(count, 0)};
  std::iota(sorted.order.begin(), sorted.order.end(), 0);
  struct Range {
    int64_t begin, end, depth;  // these places of `order` agree on their first `depth` tokens
  };
  std::vector<Range> ranges{{0, count, 0}};
  std::vector<std::pair<uint64_t, int64_t>> keyed;
  while (!ranges.empty()) {
    auto [begin, end, depth] = ranges.back();
    ranges.pop_back();
    if (end - begin < 2) continue;
    // Skip what all of them share.
    const Sequence& first = sequences[sorted.order[begin]];
    int64_t same = first.length - depth;
    for (int64_t i = begin + 1; i < end && same > 0; ++i) {
      const Sequence& other = sequences[sorted.order[i]];
      same = common_prefix(first, depth, other, depth, std::min(same, other.length - depth));
    }
    depth += same;
    keyed.clear();
    for (int64_t i = begin; i < end; ++i) {
      keyed.emplace_back(key_at(sequences[sorted.order[i]], depth), sorted.order[i]);
    }
    std::sort(keyed.begin(), keyed.end());
    for (int64_t i = begin; i < end; ++i) sorted.order[i] = keyed[i - begin].second;
    int64_t start = begin;
    for (int64_t i = begin + 1; i <= end; ++i) {
      const uint64_t before = keyed[i - 1 - begin].first, here = i < end ? keyed[i - begin].first : ~before;
      if (here == before) {
        sorted.common[i] = depth + 2;  // unless they end there; a deeper range sets it again
        continue;
      }
      if (i < end) sorted.common[i] = depth + (here >> 32 == before >> 32);
      // Equal keys with an end in them are equal sequences.
      const auto halves = (before >> 32 != 0) + ((before & 0xFFFFFFFFu) != 0);
      if (halves == 2) {
        ranges.push_back({start, i, depth + 2});
      } else {
        for (int64_t j = start + 1; j < i; ++j) sorted.common[j] = depth + halves;
      }
      start = i;
    }
  }
  return sorted;
}

Bins pack_by_prefix(const Items& items, const std::vector<int64_t>& common, const Limits& limits) {
  return Packing(items, common, limits).pack();
}

}  // namespace dpofast
