#include "packing.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

namespace dpofast {
namespace {

constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 32);
}

// Open addressing over entries that live elsewhere: find_or_add returns the first equal entry, or `entry` itself.
class HashIndex {
 public:
  explicit HashIndex(int64_t entries) {
    size_t slots = 16;
    while (slots < 2 * static_cast<size_t>(entries)) slots *= 2;
    slots_.assign(slots, {0, -1});
  }

  template <typename Equal>
  int64_t find_or_add(uint64_t hash, int64_t entry, Equal equal) {
    const size_t mask = slots_.size() - 1;
    for (size_t i = hash & mask;; i = (i + 1) & mask) {
      auto& [slot_hash, slot_entry] = slots_[i];
      if (slot_entry < 0) {
        slots_[i] = {hash, entry};
        return entry;
      }
      if (slot_hash == hash && equal(slot_entry)) return slot_entry;
    }
  }

 private:
  std::vector<std::pair<uint64_t, int64_t>> slots_;
};

// What the user calls branch `index` of an example.
std::string branch_name(const Examples& examples, int64_t example, int64_t index) {
  if (examples.grouped[example]) return "branches[" + std::to_string(index) + "]";
  return index == 0 ? "chosen_ids" : "rejected_ids";
}

std::string sequence_name(const Examples& examples, int64_t example, int64_t index) {
  return index == 0 ? "prompt_ids" : branch_name(examples, example, index - 1);
}

// The arrays must describe each other exactly before any of them is followed.
std::vector<int64_t> checked_offsets(const Examples& examples) {
  const int64_t count = examples.branch_counts.size;
  if (examples.pair_counts.size != count || examples.grouped.size != count) {
    throw PackingError(-1, "branch_counts, pair_counts and grouped need one entry for each example");
  }
  // Subtracting from what is left cannot overflow, whatever the counts hold.
  int64_t sequences_left = examples.lengths.size, pairs_left = examples.pairs.size / 2;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t branches = examples.branch_counts[e], pairs = examples.pair_counts[e];
    if (branches < 0 || branches >= sequences_left || pairs < 0 || pairs > pairs_left) {
      throw PackingError(e, "branch_counts and pair_counts go beyond lengths and pairs");
    }
    sequences_left -= branches + 1;
    pairs_left -= pairs;
  }
  std::vector<int64_t> offsets(examples.lengths.size + 1, 0);
  for (int64_t i = 0; i < examples.lengths.size; ++i) {
    if (examples.lengths[i] < 0 || examples.lengths[i] > examples.tokens.size - offsets[i]) {
      throw PackingError(-1, "lengths go beyond tokens");
    }
    offsets[i + 1] = offsets[i] + examples.lengths[i];
  }
  if (sequences_left != 0 || pairs_left != 0 || offsets.back() != examples.tokens.size || examples.pairs.size % 2) {
    throw PackingError(-1, "lengths, pairs and tokens hold more than the examples own");
  }
  return offsets;
}

void check_tokens(const Groups& groups, int64_t example, int64_t index, int64_t sequence, int64_t vocab_size) {
  const Examples& examples = groups.examples;
  const int64_t begin = groups.offsets[sequence], end = groups.offsets[sequence + 1];
  if (begin == end) {
    throw PackingError(example, sequence_name(examples, example, index) +
                                    " is empty; a prompt and a response need at least one token each");
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = examples.tokens[i];
    if (id < 0 || id >= vocab_size) {
      throw PackingError(example,
                         sequence_name(examples, example, index) + "[" + std::to_string(i - begin) + "] is " +
                             std::to_string(id) + "; expected a token id of 0 or more" +
                             (vocab_size == kUnlimited ? "" : " and below vocab_size " + std::to_string(vocab_size)));
    }
  }
}

// Reads the pairs of one example, whose branch k is unique branch branch_ids[k].
void add_pairs(Groups& groups, int64_t example, int64_t first_pair, const std::vector<int64_t>& branch_ids) {
  const Examples& examples = groups.examples;
  const int64_t branches = examples.branch_counts[example];
  if (branches == 0) throw PackingError(example, "branches is empty; expected at least two responses");
  if (examples.pair_counts[example] == 0) throw PackingError(example, "pairs is empty; expected at least one pair");
  std::vector<bool> used(branches, false);
  for (int64_t q = first_pair; q < first_pair + examples.pair_counts[example]; ++q) {
    const int64_t chosen = examples.pairs[2 * q], rejected = examples.pairs[2 * q + 1];
    for (const int64_t branch : {chosen, rejected}) {
      if (branch < 0 || branch >= branches) {
        throw PackingError(example, "pairs[" + std::to_string(q - first_pair) + "] names branch " +
                                        std::to_string(branch) + "; expected 0 to " + std::to_string(branches - 1));
      }
      used[branch] = true;
    }
    if (branch_ids[chosen] == branch_ids[rejected]) {
      throw PackingError(example, branch_name(examples, example, chosen) + " and " +
                                      branch_name(examples, example, rejected) +
                                      " form a pair but are equal; a pair needs two different responses");
    }
    groups.pairs.push_back({branch_ids[chosen], branch_ids[rejected], example});
  }
  const auto unused = std::find(used.begin(), used.end(), false);
  if (unused != used.end()) {
    throw PackingError(example,
                       "no pair uses " + branch_name(examples, example, unused - used.begin()) + "; remove it");
  }
}

void check_load(int64_t tokens, int64_t targets) {
  if (std::max(tokens, targets) <= kMaxPositions) return;
  throw PackingError(-1, "a micro-batch would hold " + std::to_string(tokens) + " tokens and " +
                             std::to_string(targets) + " targets; int32 positions allow " +
                             std::to_string(kMaxPositions) +
                             ": give a smaller max_tokens, or shorten the longest pair");
}

// Splits a group that is larger than max_tokens: appends its units to unit_sizes and sets unit_of_pair.
// The prompt is paid for once in each unit; connected pairs stay together where they fit, since they share branches.
class GroupSplitter {
 public:
  GroupSplitter(const Groups& groups, int64_t max_tokens)
      : groups_(groups),
        max_tokens_(max_tokens),
        parent_(groups.branches.size()),
        last_piece_(parent_.size(), -1),
        open_piece_(parent_.size(), -1) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }

  void split(std::vector<int64_t>& pairs, std::vector<int64_t>& unit_of_pair, std::vector<int64_t>& unit_sizes) {
    sort_by_content(pairs);
    for (const int64_t q : pairs) parent_[root(groups_.pairs[q].chosen)] = root(groups_.pairs[q].rejected);

    const int64_t prompt_cost = groups_.prompt_cost(groups_.branches[groups_.pairs[pairs[0]].chosen].group);
    const int64_t capacity = max_tokens_ - prompt_cost;
    std::vector<int64_t> piece_of_pair, piece_sizes;
    const int64_t first_piece = pieces_;
    for (const int64_t q : pairs) {
      const Pair& pair = groups_.pairs[q];
      int64_t& open = open_piece_[root(pair.chosen)];
      int64_t cost = added_cost(pair, open);
      if (open < 0 || (cost > 0 && piece_sizes[open - first_piece] + cost > capacity)) {
        open = pieces_++;
        piece_sizes.push_back(0);
        cost = added_cost(pair, open);
      }
      piece_sizes[open - first_piece] += cost;
      last_piece_[pair.chosen] = last_piece_[pair.rejected] = open;
      piece_of_pair.push_back(open - first_piece);
    }

    const Bins bins = best_fit_decreasing(piece_sizes, capacity);
    const int64_t first_unit = unit_sizes.size();
    std::vector<std::pair<int64_t, int64_t>> members;  // unit, branch
    for (size_t i = 0; i < pairs.size(); ++i) {
      const Pair& pair = groups_.pairs[pairs[i]];
      const int64_t unit = unit_of_pair[pairs[i]] = first_unit + bins.bin_of[piece_of_pair[i]];
      for (const int64_t branch : {pair.chosen, pair.rejected}) members.emplace_back(unit, branch);
    }
    // Two pieces of one component may share a branch and land in one unit, which is then smaller than its bin's load.
    std::sort(members.begin(), members.end());
    members.erase(std::unique(members.begin(), members.end()), members.end());
    unit_sizes.resize(first_unit + bins.loads.size(), prompt_cost);
    for (const auto& [unit, branch] : members) unit_sizes[unit] += groups_.branch_cost(groups_.branches[branch]);
  }

 private:
  // So that the result does not depend on the order of the examples. A pair's shorter branch leads its key: all pairs
  // among the longest branches come before a further branch is opened.
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

  int64_t added_cost(const Pair& pair, int64_t piece) const {
    int64_t cost = 0;
    for (const int64_t branch : {pair.chosen, pair.rejected}) {
      if (last_piece_[branch] != piece) cost += groups_.branch_cost(groups_.branches[branch]);
    }
    return cost;
  }

  const Groups& groups_;
  const int64_t max_tokens_;
  int64_t pieces_ = 0;
  std::vector<int64_t> parent_;      // union-find over branches
  std::vector<int64_t> last_piece_;  // the piece that a branch was last put into
  std::vector<int64_t> open_piece_;  // for the root of a component: the piece being filled
};

template <typename T>
void append(std::vector<T>& out, const T* begin, int64_t count) {
  out.insert(out.end(), begin, begin + count);
}

void append_range(std::vector<int64_t>& out, int64_t first, int64_t count) {
  out.resize(out.size() + count);
  std::iota(out.end() - count, out.end(), first);
}

}  // namespace

Groups group_examples(const Examples& examples, bool share_prompts, int64_t vocab_size) {
  Groups groups{examples, share_prompts, checked_offsets(examples), {}, {}, {}, {}};
  const int64_t* tokens = examples.tokens.data;
  const auto equal = [&](int64_t a, int64_t b) {
    const int64_t begin = groups.offsets[a], length = groups.length(a);
    return length == groups.length(b) &&
           std::equal(tokens + begin, tokens + begin + length, tokens + groups.offsets[b]);
  };
  const auto content_hash = [&](int64_t sequence) {
    uint64_t hash = groups.length(sequence);
    for (int64_t i = groups.offsets[sequence]; i < groups.offsets[sequence + 1]; ++i) hash = mix(hash, tokens[i]);
    return hash;
  };

  const int64_t count = examples.branch_counts.size;
  HashIndex prompt_index(count), branch_index(examples.lengths.size - count);
  groups.canonical.reserve(examples.lengths.size);
  std::vector<int64_t> branch_ids;
  int64_t sequence = 0, first_pair = 0;
  for (int64_t e = 0; e < count; ++e) {
    for (int64_t k = 0; k <= examples.branch_counts[e]; ++k) check_tokens(groups, e, k, sequence + k, vocab_size);

    const int64_t next_group = groups.prompts.size();
    const int64_t group = prompt_index.find_or_add(
        content_hash(sequence), next_group, [&](int64_t other) { return equal(groups.prompts[other], sequence); });
    if (group == next_group) groups.prompts.push_back(sequence);
    groups.canonical.push_back(groups.prompts[group]);
    ++sequence;

    branch_ids.clear();
    for (int64_t k = 0; k < examples.branch_counts[e]; ++k, ++sequence) {
      const uint64_t hash = content_hash(sequence);
      const int64_t next_branch = groups.branches.size();
      const int64_t branch = branch_index.find_or_add(mix(hash, group), next_branch, [&](int64_t other) {
        return groups.branches[other].group == group && equal(groups.branches[other].sequence, sequence);
      });
      if (branch == next_branch) groups.branches.push_back({sequence, group, hash});
      groups.canonical.push_back(groups.branches[branch].sequence);
      branch_ids.push_back(branch);
    }
    add_pairs(groups, e, first_pair, branch_ids);
    first_pair += examples.pair_counts[e];
  }
  return groups;
}

Bins plan_items(const std::vector<int64_t>& sizes, int64_t max_tokens) {
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 1 || sizes[i] > kMaxPositions) {
      throw PackingError(-1, "lengths[" + std::to_string(i) + "] is " + std::to_string(sizes[i]) + "; expected 1 to " +
                                 std::to_string(kMaxPositions));
    }
  }
  Bins bins = pack_evenly(sizes, max_tokens);
  if (!bins.loads.empty()) check_load(bins.loads[0], 0);
  return bins;
}

std::vector<std::vector<int64_t>> plan_batches(const Groups& groups, int64_t max_tokens) {
  const int64_t group_count = groups.prompts.size(), pair_count = groups.pairs.size();
  const auto group_of = [&](int64_t q) { return groups.branches[groups.pairs[q].chosen].group; };
  std::vector<int64_t> group_sizes(group_count);
  for (int64_t g = 0; g < group_count; ++g) group_sizes[g] = groups.prompt_cost(g);
  for (const Branch& branch : groups.branches) group_sizes[branch.group] += groups.branch_cost(branch);

  // A unit is what the global plan may not split: a whole group, or a part of a group that is too large.
  std::vector<int64_t> unit_sizes, unit_of_group(group_count), unit_of_pair(pair_count);
  std::vector<std::vector<int64_t>> large;
  for (int64_t g = 0; g < group_count; ++g) {
    if (group_sizes[g] <= max_tokens) {
      unit_of_group[g] = unit_sizes.size();
      unit_sizes.push_back(group_sizes[g]);
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
    GroupSplitter splitter(groups, max_tokens);
    for (auto& pairs : large) splitter.split(pairs, unit_of_pair, unit_sizes);
  }

  const Bins bins = pack_evenly(unit_sizes, max_tokens);
  std::vector<std::vector<int64_t>> plan(bins.loads.size());
  for (int64_t q = 0; q < pair_count; ++q) plan[bins.bin_of[unit_of_pair[q]]].push_back(q);
  return plan;
}

std::vector<Batch> fill_batches(const Groups& groups, const std::vector<std::vector<int64_t>>& plan) {
  const int64_t* tokens = groups.examples.tokens.data;
  std::vector<int32_t> local_group(groups.prompts.size(), -1), local_branch(groups.branches.size(), -1);
  std::vector<Batch> batches;
  batches.reserve(plan.size());
  for (const std::vector<int64_t>& pairs : plan) {
    // Groups in order of first appearance, then their branches in order of first appearance.
    std::vector<int64_t> branches, seen_groups;
    for (const int64_t q : pairs) {
      for (const int64_t id : {groups.pairs[q].chosen, groups.pairs[q].rejected}) {
        if (local_branch[id] >= 0) continue;
        local_branch[id] = 0;
        branches.push_back(id);
        int32_t& group = local_group[groups.branches[id].group];
        if (group >= 0) continue;
        group = seen_groups.size();
        seen_groups.push_back(groups.branches[id].group);
      }
    }
    std::stable_sort(branches.begin(), branches.end(), [&](int64_t a, int64_t b) {
      return local_group[groups.branches[a].group] < local_group[groups.branches[b].group];
    });

    int64_t token_count = 0, target_count = 0, longest = 0;
    for (const int64_t group : seen_groups) token_count += groups.prompt_cost(group);
    for (const int64_t id : branches) {
      const Branch& branch = groups.branches[id];
      token_count += groups.branch_cost(branch);
      target_count += groups.length(branch.sequence);
      longest = std::max(longest, groups.length(groups.prompts[branch.group]) + groups.length(branch.sequence));
    }
    check_load(token_count, target_count);

    Batch batch;
    batch.input_ids.reserve(token_count);
    batch.position_ids.reserve(token_count);
    batch.logit_rows.reserve(target_count);
    batch.targets.reserve(target_count);
    batch.cu_seqlens_q.push_back(0);
    batch.cu_targets.push_back(0);
    int64_t open_group = -1, prompt_start = 0;
    for (size_t s = 0; s < branches.size(); ++s) {
      const Branch& branch = groups.branches[branches[s]];
      const int64_t prompt = groups.prompts[branch.group], prompt_length = groups.length(prompt);
      const int64_t* response = tokens + groups.offsets[branch.sequence];
      const int64_t length = groups.length(branch.sequence);
      const bool new_prompt = branch.group != open_group || !groups.share_prompts;
      if (new_prompt) {
        open_group = branch.group;
        prompt_start = batch.input_ids.size();
        append(batch.input_ids, tokens + groups.offsets[prompt], prompt_length);
        append_range(batch.position_ids, 0, prompt_length);
      }
      // The last prompt row predicts the first token; the last token predicts nothing and has no row.
      const int64_t first_row = batch.input_ids.size();
      append(batch.input_ids, response, length - 1);
      append_range(batch.position_ids, prompt_length, length - 1);
      batch.logit_rows.push_back(prompt_start + prompt_length - 1);
      append_range(batch.logit_rows, first_row, length - 1);
      append(batch.targets, response, length);
      batch.cu_targets.push_back(static_cast<int32_t>(batch.targets.size()));
      if (new_prompt || length > 1) {
        const int32_t prefix_start = new_prompt ? 0 : static_cast<int32_t>(prompt_start);
        batch.prefixes.push_back(prefix_start);
        batch.prefixes.push_back(new_prompt ? 0 : prefix_start + static_cast<int32_t>(prompt_length));
        batch.cu_seqlens_q.push_back(static_cast<int32_t>(batch.input_ids.size()));
      }
      batch.sequences.push_back(branch.sequence);
      local_branch[branches[s]] = static_cast<int32_t>(s);
    }
    for (const int64_t q : pairs) {
      batch.pairs.push_back(local_branch[groups.pairs[q].chosen]);
      batch.pairs.push_back(local_branch[groups.pairs[q].rejected]);
      batch.pair_examples.push_back(groups.pairs[q].example);
    }
    batch.padded_tokens = 2 * static_cast<int64_t>(pairs.size()) * longest;
    batches.push_back(std::move(batch));
    for (const int64_t id : branches) local_branch[id] = -1;
    for (const int64_t group : seen_groups) local_group[group] = -1;
  }
  return batches;
}

}  // namespace dpofast
