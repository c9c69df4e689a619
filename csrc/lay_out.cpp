#include <algorithm>
#include <utility>

#include "batches.hpp"
#include "index_map.hpp"
#include "parallel.hpp"

namespace dpofast {
namespace {

// Collects the branches of each micro-batch's comparisons.
class Collector {
 public:
  explicit Collector(const Groups& groups) : groups_(groups) {}

  void collect(Batch& batch) {
    const int64_t members = prefetch_all(batch.comparisons);
    local_branch_.reset(members);
    local_group_.reset(batch.comparisons.size());
    int32_t groups_seen = 0;
    for (const int64_t q : batch.comparisons) {
      for (const int64_t id : groups_.members_of(q)) {
        int32_t& seen = local_branch_[id];
        if (seen >= 0) continue;
        seen = 0;
        batch.branches.push_back(id);
        int32_t& group = local_group_[groups_.branches[id].group];
        if (group < 0) group = groups_seen++;
      }
    }
    const auto order = [&](int64_t a, int64_t b) {
      return local_group_[groups_.branches[a].group] < local_group_[groups_.branches[b].group];
    };
    auto& branches = batch.branches;
    if (!std::is_sorted(branches.begin(), branches.end(), order)) {
      std::stable_sort(branches.begin(), branches.end(), order);
    }
    int64_t longest = 0;
    for (size_t s = 0; s < branches.size(); ++s) {
      const Branch& branch = groups_.branches[branches[s]];
      local_branch_[branches[s]] = static_cast<int32_t>(s);
      batch.shape.targets += branch.length;
      longest = std::max(longest, groups_.prompts[branch.group].length + branch.length);
    }
    batch.sequences.reserve(members);
    for (const int64_t q : batch.comparisons) {
      const auto ids = groups_.members_of(q);
      for (const int64_t id : ids) batch.sequences.push_back(local_branch_[id]);
      if (groups_.examples.lists()) batch.shape.width = std::max(batch.shape.width, ids.size);
    }
    batch.shape.sequences = branches.size();
    batch.shape.comparisons = batch.comparisons.size();
    batch.shape.padded_tokens = members * longest;
  }

 private:
  // Returns the number of members of all comparisons.
  int64_t prefetch_all(const std::vector<int64_t>& comparisons) const {
    const auto each_branch = [&](auto body) {
      for (const int64_t q : comparisons) {
        for (const int64_t id : groups_.members_of(q)) body(id);
      }
    };
    int64_t members = 0;
    for (const int64_t q : comparisons) {
      prefetch(&groups_.members[groups_.first_member(q)]);
      members += groups_.members_of(q).size;
    }
    each_branch([&](int64_t id) { prefetch(&groups_.branches[id]); });
    each_branch([&](int64_t id) { prefetch(&groups_.prompts[groups_.branches[id].group]); });
    return members;
  }

  const Groups& groups_;
  IndexMap local_group_, local_branch_;  // places of groups and branches in the current micro-batch
};

}  // namespace

std::vector<Batch> lay_out(const Groups& groups, std::vector<std::vector<int64_t>> plan, int64_t threads) {
  std::vector<Batch> batches(plan.size());
  parallel_ranges(batches.size(), threads, [&](int64_t begin, int64_t end) {
    Collector collector(groups);
    TrieBuilder builder(groups);
    for (int64_t b = begin; b < end; ++b) {
      Batch& batch = batches[b];
      batch.comparisons = std::move(plan[b]);
      collector.collect(batch);
      batch.trie = builder.build(batch.branches.data(), batch.shape.sequences);
      batch.shape.tokens = batch.trie.rows();
      batch.shape.segments = batch.trie.parents.size();
    }
  });
  for (const Batch& batch : batches) check_positions(batch.shape.tokens, batch.shape.targets);
  std::sort(batches.begin(), batches.end(), [](const Batch& a, const Batch& b) {
    return a.shape.tokens != b.shape.tokens ? a.shape.tokens > b.shape.tokens : a.comparisons[0] < b.comparisons[0];
  });
  return batches;
}

}  // namespace dpofast
