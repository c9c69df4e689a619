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
};

// Examples as flat arrays. Each example has consecutive sequences, its prompt followed by its branches, and consecutive
// pairs, which number its branches from 0.
struct Examples {
  Span<Sequence> sequences;
  Span<int64_t> branch_counts;  // (E,) branches of each example
  Span<int64_t> pair_counts;    // (E,) pairs of each example
  Span<int64_t> pairs;          // (Q, 2) chosen, rejected; size is 2 * Q
  Span<uint8_t> grouped;  // (E,) 0: prompt_ids, chosen_ids, rejected_ids; 1: prompt_ids, branches, pairs (for messages)
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
  uint64_t hash;  // of its tokens alone
};

struct Pair {
  int64_t chosen, rejected;  // indices into Groups::branches
  int64_t example;
};

// Which rows sequences share: none, those of the prompt of a group, or all that they begin with alike.
enum class Share { kNone, kPrompt, kPrefix };

// Groups: examples with equal prompts are merged, and within a group equal responses are one branch.
struct Groups {
  Examples examples;
  Share share;
  std::vector<int64_t> canonical;  // for each input sequence the first equal one (of the same group)
  std::vector<Prompt> prompts;     // of each group
  std::vector<Branch> branches;
  std::vector<Pair> pairs;  // one for each input pair, in input order

  // Rows of a group's prompt, and in addition those of each of its branches where branches share no more than that. A
  // branch's last token is only a target.
  int64_t prompt_cost(int64_t group) const { return share == Share::kNone ? 0 : prompts[group].length; }
  int64_t branch_cost(const Branch& branch) const {
    return branch.length - 1 + (share == Share::kNone ? prompts[branch.group].length : 0);
  }
};

// Validates all values (ids in [0, vocab_size), no empty sequence, pairs of two different branches) and merges equal
// prompts and responses. Throws PackingError.
Groups group_examples(const Examples& examples, Share share, int64_t vocab_size, int64_t threads);

}  // namespace dpofast
