// Packing of preference pairs: examples -> groups (a prompt and its distinct branches) -> micro-batches -> flat arrays.
// Pure C++17, no Python: everything is read through borrowed pointers that the caller has sized, and bad values throw.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "planner.hpp"

namespace dpofast {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// Bad input. `example` is the row it was found in, or -1 where no single row is at fault.
class PackingError : public std::invalid_argument {
 public:
  PackingError(int64_t example, const std::string& what)
      : std::invalid_argument(example < 0 ? what : "examples[" + std::to_string(example) + "]: " + what),
        example(example) {}
  const int64_t example;
};

// A borrowed array.
template <typename T>
struct Span {
  const T* data;
  int64_t size;
  T operator[](int64_t i) const { return data[i]; }
};

// Examples as flat arrays. An example owns a run of sequences, its prompt first and its branches after it, and a run of
// pairs that name its branches from 0.
struct Examples {
  Span<int64_t> tokens;         // every sequence, one after another
  Span<int64_t> lengths;        // tokens of each sequence
  Span<int64_t> branch_counts;  // (E,) branches of each example
  Span<int64_t> pair_counts;    // (E,) pairs of each example
  Span<int64_t> pairs;          // (Q, 2) chosen, rejected; size is 2 * Q
  Span<uint8_t> grouped;  // (E,) 0: prompt_ids, chosen_ids, rejected_ids; 1: prompt_ids, branches, pairs (for messages)
};

struct Branch {
  int64_t sequence;  // the input sequence where it first appeared
  int64_t group;
  uint64_t hash;  // of its tokens alone
};

struct Pair {
  int64_t chosen, rejected;  // indices into Groups::branches
  int64_t example;
};

// Examples with equal prompts merged into groups and equal responses of a group merged into branches.
struct Groups {
  Examples examples;
  bool share_prompts;
  std::vector<int64_t> offsets;    // sequence i is tokens[offsets[i]:offsets[i + 1]]
  std::vector<int64_t> canonical;  // for each input sequence the first equal one (of the same group)
  std::vector<int64_t> prompts;    // the prompt's sequence for each group
  std::vector<Branch> branches;
  std::vector<Pair> pairs;  // one for each input pair, in input order

  int64_t length(int64_t sequence) const { return offsets[sequence + 1] - offsets[sequence]; }
  // Positions a group costs once, and each of its branches on top. A branch's last token is only a target.
  int64_t prompt_cost(int64_t group) const { return share_prompts ? length(prompts[group]) : 0; }
  int64_t branch_cost(const Branch& branch) const {
    return length(branch.sequence) - 1 + (share_prompts ? 0 : length(prompts[branch.group]));
  }
};

// Validates every value (ids in [0, vocab_size), nothing empty, pairs that name two different branches) and merges.
Groups group_examples(const Examples& examples, bool share_prompts, int64_t vocab_size);

// pack_evenly for micro-batches: checks that sizes are in [1, 2^31) and that no load passes int32 positions.
Bins plan_items(const std::vector<int64_t>& sizes, int64_t max_tokens);

// The pairs of each micro-batch, ascending. A group stays whole when it fits; a pair is never split.
std::vector<std::vector<int64_t>> plan_batches(const Groups& groups, int64_t max_tokens);

// One micro-batch; T positions, N targets, S branches, P pairs, G attention segments.
struct Batch {
  std::vector<int64_t> input_ids, position_ids;  // (T,)
  std::vector<int64_t> logit_rows, targets;      // (N,)
  std::vector<int32_t> cu_seqlens_q;             // (G + 1,)
  std::vector<int32_t> prefixes;                 // (G, 2)
  std::vector<int32_t> cu_targets;               // (S + 1,)
  std::vector<int32_t> pairs;                    // (P, 2)
  std::vector<int64_t> pair_examples;            // (P,)
  std::vector<int64_t> sequences;                // (S,) the input sequence of each branch
  int64_t padded_tokens = 0;                     // 2 * P * the longest prompt + response
};

std::vector<Batch> fill_batches(const Groups& groups, const std::vector<std::vector<int64_t>>& plan);

}  // namespace dpofast
