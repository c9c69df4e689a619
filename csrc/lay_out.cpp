#include <algorithm>
#include <utility>

#include "batches.hpp"
#include "parallel.hpp"

namespace dpofast {
namespace {

// Collects the branches of each micro-batch's pairs.
class Collector {
 public:
  explicit Collector(const Groups& groups)
      : groups_(groups), local_group_(groups.prompts.size(), -1), local_branch_(groups.branches.size(), -1) {}

  void collect(Batch& batch) {
    groups_seen_.clear();
    for (const int64_t q : batch.pairs) {
      for (const int64_t id : {groups_.pairs[q].chosen, groups_.pairs[q].rejected}) {
        if (local_branch_[id] >= 0) continue;
        local_branch_[id] = 0;
        batch.branches.push_back(id);
        const int64_t group = groups_.branches[id].group;
        if (local_group_[group] >= 0) continue;
        local_group_[group] = static_cast<int32_t>(groups_seen_.size());
        groups_seen_.push_back(group);
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
      const int64_t response = groups_.length(branch.sequence);
      batch.shape.targets += response;
      longest = std::max(longest, groups_.length(groups_.prompts[branch.group]) + response);
    }
    for (const int64_t q : batch.pairs) {
      batch.sequences.push_back(local_branch_[groups_.pairs[q].chosen]);
      batch.sequences.push_back(local_branch_[groups_.pairs[q].rejected]);
    }
    batch.shape.sequences = branches.size();
    batch.shape.pairs = batch.pairs.size();
    batch.shape.padded_tokens = 2 * batch.shape.pairs * longest;
    for (const int64_t id : branches) local_branch_[id] = -1;
    for (const int64_t group : groups_seen_) local_group_[group] = -1;
  }

 private:
  const Groups& groups_;
  // Places of groups and branches in the current micro-batch, or -1.
  std::vector<int32_t> local_group_, local_branch_;
  std::vector<int64_t> groups_seen_;
};

}  // namespace

std::vector<Batch> lay_out(const Groups& groups, std::vector<std::vector<int64_t>> plan, int64_t threads) {
  std::vector<Batch> batches(plan.size());
  Collector collector(groups);
  for (size_t b = 0; b < plan.size(); ++b) {
    batches[b].pairs = std::move(plan[b]);
    collector.collect(batches[b]);
  }
  parallel_ranges(batches.size(), threads, [&](int64_t begin, int64_t end) {
    TrieBuilder builder(groups);
    for (int64_t b = begin; b < end; ++b) {
      Batch& batch = batches[b];
      batch.trie = builder.build(batch.branches.data(), batch.shape.sequences);
      batch.shape.tokens = batch.trie.rows();
      batch.shape.segments = batch.trie.parents.size();
    }
  });
  for (const Batch& batch : batches) check_positions(batch.shape.tokens, batch.shape.targets);
  std::sort(batches.begin(), batches.end(), [](const Batch& a, const Batch& b) {
    return a.shape.tokens != b.shape.tokens ? a.shape.tokens > b.shape.tokens : a.pairs[0] < b.pairs[0];
  });
  return batches;
}

}  // namespace dpofast
