#include "groups.hpp"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "parallel.hpp"

namespace dpofast {
namespace {

// Hash index with open addressing over entries stored elsewhere: find_or_add returns the first equal entry, or `entry`.
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

// Name of branch `index` of an example in the user's input, for messages.
std::string branch_name(const Examples& examples, int64_t example, int64_t index) {
  if (examples.grouped[example]) return "branches[" + std::to_string(index) + "]";
  return index == 0 ? "chosen_ids" : "rejected_ids";
}

std::string sequence_name(const Examples& examples, int64_t example, int64_t index) {
  return index == 0 ? "prompt_ids" : branch_name(examples, example, index - 1);
}

// Throws PackingError unless the counts match the array lengths. Must run before the counts are used as offsets.
void check_counts(const Examples& examples) {
  const int64_t count = examples.branch_counts.size;
  if (examples.pair_counts.size != count || examples.grouped.size != count) {
    throw PackingError(-1, "branch_counts, pair_counts and grouped need one entry for each example");
  }
  // Subtracting from the remainder cannot overflow for any counts.
  int64_t sequences_left = examples.sequences.size, pairs_left = examples.pairs.size / 2;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t branches = examples.branch_counts[e], pairs = examples.pair_counts[e];
    if (branches < 0 || branches >= sequences_left || pairs < 0 || pairs > pairs_left) {
      throw PackingError(e, "branch_counts and pair_counts go beyond sequences and pairs");
    }
    sequences_left -= branches + 1;
    pairs_left -= pairs;
  }
  if (sequences_left != 0 || pairs_left != 0 || examples.pairs.size % 2) {
    throw PackingError(-1, "sequences and pairs hold more than the examples own");
  }
}

// Throws the PackingError for a sequence that is empty or has an id out of range.
[[noreturn]] void refuse(const Examples& examples, int64_t example, int64_t index, const Sequence& sequence,
                         int64_t vocab_size) {
  const std::string name = sequence_name(examples, example, index);
  for (int64_t i = 0; i < sequence.length; ++i) {
    if (sequence[i] >= 0 && sequence[i] < vocab_size) continue;
    throw PackingError(
        example,
        name + "[" + std::to_string(i) + "] is " + std::to_string(sequence[i]) + "; expected a token id of 0 or more" +
            (vocab_size == kTokenIds ? " and below 2**31" : " and below vocab_size " + std::to_string(vocab_size)));
  }
  throw PackingError(example, name + " is empty; a prompt and a response need at least one token each");
}

// Returns the hash of every sequence. Throws PackingError if one is empty or has an id outside [0, vocab_size) or
// [0, 2**31).
std::vector<uint64_t> checked_hashes(const Examples& examples, int64_t vocab_size, int64_t threads) {
  vocab_size = std::min(vocab_size, kTokenIds);
  const int64_t count = examples.sequences.size;
  std::vector<uint64_t> hashes(count);
  std::atomic<bool> valid{true};
  parallel_ranges(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence& ids = examples.sequences[i];
      if (ids.length == 0 || !in_range(ids, vocab_size)) valid.store(false, std::memory_order_relaxed);
      hashes[i] = content_hash(ids);
    }
  });
  if (valid) return hashes;
  int64_t sequence = 0;
  for (int64_t e = 0; e < examples.branch_counts.size; ++e) {
    for (int64_t k = 0; k <= examples.branch_counts[e]; ++k, ++sequence) {
      const Sequence& ids = examples.sequences[sequence];
      if (ids.length == 0 || !in_range(ids, vocab_size)) refuse(examples, e, k, ids, vocab_size);
    }
  }
  return hashes;
}

// Appends the pairs of one example, whose branch k is the distinct branch branch_ids[k].
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

}  // namespace

Groups group_examples(const Examples& examples, Share share, int64_t vocab_size, int64_t threads) {
  check_counts(examples);
  const std::vector<uint64_t> hashes = checked_hashes(examples, vocab_size, threads);
  Groups groups{examples, share, {}, {}, {}, {}};
  const auto length = [&](int64_t i) { return examples.sequences[i].length; };
  const auto same = [&](int64_t a, int64_t b) { return equal(examples.sequences[a], examples.sequences[b]); };

  const int64_t count = examples.branch_counts.size;
  HashIndex prompt_index(count), branch_index(examples.sequences.size - count);
  groups.canonical.reserve(examples.sequences.size);
  groups.prompts.reserve(count);
  groups.branches.reserve(examples.sequences.size - count);
  groups.pairs.reserve(examples.pairs.size / 2);
  std::vector<int64_t> branch_ids;
  int64_t sequence = 0, first_pair = 0;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t next_group = groups.prompts.size();
    const int64_t group = prompt_index.find_or_add(
        hashes[sequence], next_group, [&](int64_t other) { return same(groups.prompts[other].sequence, sequence); });
    if (group == next_group) groups.prompts.push_back({sequence, length(sequence), examples.sequences[sequence][0]});
    groups.canonical.push_back(groups.prompts[group].sequence);
    ++sequence;

    branch_ids.clear();
    for (int64_t k = 0; k < examples.branch_counts[e]; ++k, ++sequence) {
      const uint64_t hash = hashes[sequence];
      const int64_t next_branch = groups.branches.size();
      const int64_t branch = branch_index.find_or_add(mix(hash, group), next_branch, [&](int64_t other) {
        return groups.branches[other].group == group && same(groups.branches[other].sequence, sequence);
      });
      if (branch == next_branch)
        groups.branches.push_back({sequence, length(sequence), examples.sequences[sequence][0], group, hash});
      groups.canonical.push_back(groups.branches[branch].sequence);
      branch_ids.push_back(branch);
    }
    add_pairs(groups, e, first_pair, branch_ids);
    first_pair += examples.pair_counts[e];
  }
  return groups;
}

}  // namespace dpofast
