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
  const Form form = static_cast<Form>(examples.forms[example]);
  if (form == Form::kPair) return index == 0 ? "chosen_ids" : "rejected_ids";
  return (form == Form::kList ? "responses_ids[" : "branches[") + std::to_string(index) + "]";
}

std::string sequence_name(const Examples& examples, int64_t example, int64_t index) {
  return index == 0 ? "prompt_ids" : branch_name(examples, example, index - 1);
}

// Throws PackingError unless the counts match the array lengths. Must run before the counts are used as offsets.
void check_counts(const Examples& examples) {
  const int64_t count = examples.branch_counts.size;
  if (examples.comparison_counts.size != count || examples.forms.size != count) {
    throw PackingError(-1, "branch_counts, comparison_counts and forms need one entry for each example");
  }
  if (examples.variants.size != 0 && examples.variants.size != examples.sequences.size) {
    throw PackingError(-1, "variants need one entry for each sequence, or none");
  }
  if (examples.ranks.size != (examples.lists() ? examples.members.size : 0)) {
    throw PackingError(-1, "ranks need one entry for each member of a list, and none for pairs");
  }
  // Subtracting from the remainder cannot overflow for any counts.
  int64_t members_left = examples.members.size;
  for (const int64_t members : examples.member_counts) {
    if (members < 2 || members > members_left) throw PackingError(-1, "member_counts are below 2 or go beyond members");
    members_left -= members;
  }
  if (examples.lists() ? members_left != 0 : members_left % 2 != 0) {
    throw PackingError(-1, "members hold more than the comparisons own");
  }
  int64_t sequences_left = examples.sequences.size, comparisons_left = examples.comparisons();
  for (int64_t e = 0; e < count; ++e) {
    const int64_t branches = examples.branch_counts[e], comparisons = examples.comparison_counts[e];
    if (branches < 0 || branches >= sequences_left || comparisons < 0 || comparisons > comparisons_left) {
      throw PackingError(e, "branch_counts and comparison_counts go beyond sequences and members");
    }
    sequences_left -= branches + 1;
    comparisons_left -= comparisons;
  }
  if (sequences_left != 0 || comparisons_left != 0) {
    throw PackingError(-1, "sequences and members hold more than the examples own");
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

// Throws PackingError unless a list's ranks are 0, then equal or one more from member to member, and two at least.
void check_ranks(const Examples& examples, int64_t example, int64_t first, int64_t count) {
  int64_t before = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t rank = examples.ranks[i];
    if (rank != before && (i == first || rank != before + 1)) {
      throw PackingError(example, "ranks: expected them to go up from 0 by steps of 1, got " + std::to_string(rank) +
                                      " after " + std::to_string(before));
    }
    before = rank;
  }
  if (before == 0) throw PackingError(example, "ranks: all responses are tied; expected two ranks or more");
}

// Appends the comparisons of each example in turn.
class ComparisonReader {
 public:
  // `twins`: of each branch, the first branch of its group with the same tokens; empty if that is always itself.
  ComparisonReader(Groups& groups, const std::vector<int64_t>& twins) : groups_(groups), twins_(twins) {
    groups.members.reserve(groups.examples.members.size);
    groups.comparison_examples.reserve(groups.examples.comparisons());
    if (groups.examples.lists()) {
      groups.first_members.reserve(groups.examples.comparisons() + 1);
      groups.first_members.push_back(0);
    }
  }

  // Those of an example whose branch k is the distinct branch branch_ids[k].
  void read(int64_t example, const std::vector<int64_t>& branch_ids) {
    const Examples& examples = groups_.examples;
    const int64_t branches = examples.branch_counts[example], count = examples.comparison_counts[example];
    if (branches == 0) throw PackingError(example, "branches is empty; expected at least two responses");
    if (count == 0) throw PackingError(example, "pairs is empty; expected at least one pair");
    used_.assign(branches, false);
    for (int64_t q = 0; q < count; ++q, ++comparison_) {
      const int64_t first = groups_.members.size(), members = examples.member_count(comparison_);
      for (int64_t i = first; i < first + members; ++i) {
        const int64_t branch = examples.members[i];
        if (branch < 0 || branch >= branches) {
          throw PackingError(example, "pairs[" + std::to_string(q) + "] names branch " + std::to_string(branch) +
                                          "; expected 0 to " + std::to_string(branches - 1));
        }
        used_[branch] = true;
        groups_.members.push_back(branch_ids[branch]);
      }
      if (examples.lists()) {
        check_ranks(examples, example, first, members);
        groups_.first_members.push_back(groups_.members.size());
      }
      check_different(example, first, members);
      groups_.comparison_examples.push_back(example);
    }
    const auto unused = std::find(used_.begin(), used_.end(), false);
    if (unused != used_.end()) {
      throw PackingError(example,
                         "no pair uses " + branch_name(examples, example, unused - used_.begin()) + "; remove it");
    }
  }

 private:
  // Throws PackingError if two members of different rank have the same tokens.
  void check_different(int64_t example, int64_t first, int64_t count) const {
    const Examples& examples = groups_.examples;
    const auto tokens = [&](int64_t i) { return twins_.empty() ? groups_.members[i] : twins_[groups_.members[i]]; };
    for (int64_t i = first; i < first + count; ++i) {
      for (int64_t j = i + 1; j < first + count; ++j) {
        if (tokens(i) != tokens(j) || (examples.lists() && examples.ranks[i] == examples.ranks[j])) continue;
        const std::string names = branch_name(examples, example, examples.members[i]) + " and " +
                                  branch_name(examples, example, examples.members[j]);
        throw PackingError(
            example, names + (examples.lists() ? " are equal but of different rank; give equal responses one rank"
                                               : " form a pair but are equal; a pair needs two different responses"));
      }
    }
  }

  Groups& groups_;
  const std::vector<int64_t>& twins_;
  int64_t comparison_ = 0;
  std::vector<bool> used_;
};

}  // namespace

Groups group_examples(const Examples& examples, Share share, int64_t vocab_size, int64_t threads) {
  check_counts(examples);
  const std::vector<uint64_t> hashes = checked_hashes(examples, vocab_size, threads);
  Groups groups{examples, share, {}, {}, {}, {}, {}, {}};
  const auto length = [&](int64_t i) { return examples.sequences[i].length; };
  const auto same = [&](int64_t a, int64_t b) { return equal(examples.sequences[a], examples.sequences[b]); };

  const int64_t count = examples.branch_counts.size;
  const bool variants = examples.variants.size > 0;
  HashIndex prompt_index(count), branch_index(examples.sequences.size - count);
  HashIndex twin_index(variants ? examples.sequences.size - count : 0);  // branches by tokens alone
  groups.canonical.reserve(examples.sequences.size);
  groups.prompts.reserve(count);
  groups.branches.reserve(examples.sequences.size - count);
  std::vector<int64_t> branch_ids, twins;
  ComparisonReader comparisons(groups, twins);
  int64_t sequence = 0;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t next_group = groups.prompts.size();
    const int64_t group = prompt_index.find_or_add(
        hashes[sequence], next_group, [&](int64_t other) { return same(groups.prompts[other].sequence, sequence); });
    if (group == next_group) groups.prompts.push_back({sequence, length(sequence), examples.sequences[sequence][0]});
    groups.canonical.push_back(groups.prompts[group].sequence);
    ++sequence;

    branch_ids.clear();
    for (int64_t k = 0; k < examples.branch_counts[e]; ++k, ++sequence) {
      const uint64_t hash = variants ? mix(hashes[sequence], examples.variants[sequence]) : hashes[sequence];
      const int64_t next_branch = groups.branches.size();
      const int64_t branch = branch_index.find_or_add(mix(hash, group), next_branch, [&](int64_t other) {
        const Branch& found = groups.branches[other];
        return found.group == group && same(found.sequence, sequence) &&
               (!variants || examples.variants[found.sequence] == examples.variants[sequence]);
      });
      if (branch == next_branch) {
        groups.branches.push_back({sequence, length(sequence), examples.sequences[sequence][0], group, hash});
        if (variants) {
          twins.push_back(twin_index.find_or_add(mix(hashes[sequence], group), branch, [&](int64_t other) {
            return groups.branches[other].group == group && same(groups.branches[other].sequence, sequence);
          }));
        }
      }
      groups.canonical.push_back(groups.branches[branch].sequence);
      branch_ids.push_back(branch);
    }
    comparisons.read(e, branch_ids);
  }
  return groups;
}

}  // namespace dpofast
