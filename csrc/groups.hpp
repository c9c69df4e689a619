// Examples -> groups of a prompt and its distinct branches. All values are validated here. Pure C++17, no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "errors.hpp"
#include "sequences.hpp"

namespace dpofast {

// A non-owning view of an array.
template <typename T>
struct Span {
  const T* data;
  int64_t size;
  const T& operator[](int64_t i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

// The keys that an example came with, for messages.
enum class Form : uint8_t {
  kPair,   // prompt_ids, chosen_ids, rejected_ids
  kGroup,  // prompt_ids, branches, pairs
  kList,   // prompt_ids, responses_ids
};

// Examples as flat arrays. A comparison is a pair (chosen, rejected) or a list of two or more responses, best first.
// Each example has consecutive sequences, its prompt followed by its branches, and consecutive comparisons, whose
// members are branches of the example, numbered from 0. A call has either pairs or lists.
struct Examples {
  Span<Sequence> sequences;
  Span<int64_t> branch_counts;      // (E,) branches of each example
  Span<int64_t> comparison_counts;  // (E,) comparisons of each example
  Span<int64_t> members;            // (M,) of one comparison after another
  Span<int64_t> member_counts;      // (Q,) members of each list; empty for pairs
  Span<int64_t> ranks;              // (M,) of the members of lists: from 0, the best, ties are equal; empty for pairs
  Span<int64_t>
      variants;         // (n,) of each sequence, or empty: responses with equal tokens of two variants are two branches
  Span<uint8_t> forms;  // (E,) Form

  bool lists() const { return member_counts.size > 0; }
  int64_t comparisons() const { return lists() ? member_counts.size : members.size / 2; }
  int64_t member_count(int64_t comparison) const { return lists() ? member_counts[comparison] : 2; }
};

// Length and first token stand here too: where sequences begin differently, no more of them is read for a plan.
struct Prompt {
  int64_t sequence;  // the input sequence where it first appeared
  int64_t length, first;
};

struct Branch {
  int64_t sequence;  // the input sequence where it first appeared
  int64_t length, first;
  int64_t group;
  uint64_t hash;  // of its tokens and its variant alone
};

// Which rows sequences share: none, those of the prompt of a group, or all that they begin with alike.
enum class Share { kNone, kPrompt, kPrefix };

// Groups: examples with equal prompts are merged, and within a group equal responses (of one variant) are one branch.
struct Groups {
  Examples examples;
  Share share;
  std::vector<int64_t> canonical;  // for each input sequence the first equal one (of the same group)
  std::vector<Prompt> prompts;     // of each group
  std::vector<Branch> branches;
  std::vector<int64_t> members;              // (M,) branches of every comparison, in input order
  std::vector<int64_t> first_members;        // (Q + 1,) where each list's begin; empty for pairs
  std::vector<int64_t> comparison_examples;  // (Q,)

  int64_t comparisons() const { return comparison_examples.size(); }
  int64_t first_member(int64_t comparison) const {
    return first_members.empty() ? 2 * comparison : first_members[comparison];
  }
  Span<int64_t> members_of(int64_t comparison) const {
    const int64_t first = first_member(comparison);
    return {members.data() + first, first_member(comparison + 1) - first};
  }
  // All members of a comparison are of one group.
  int64_t group_of(int64_t comparison) const { return branches[members[first_member(comparison)]].group; }

  // Rows of a group's prompt, and in addition those of each of its branches where branches share no more than that. A
  // branch's last token is only a target.
  int64_t prompt_cost(int64_t group) const { return share == Share::kNone ? 0 : prompts[group].length; }
  int64_t branch_cost(const Branch& branch) const {
    return branch.length - 1 + (share == Share::kNone ? prompts[branch.group].length : 0);
  }
};

// Validates all values (ids in [0, vocab_size), no empty sequence, no equal responses of different rank in a
// comparison) and merges equal prompts and responses. Throws PackingError.
Groups group_examples(const Examples& examples, Share share, int64_t vocab_size, int64_t threads);

}  // namespace dpofast
