// Groups -> micro-batches: assigns pairs to micro-batches and writes the arrays of each. Pure C++17, no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "groups.hpp"
#include "planner.hpp"

namespace dpofast {

// Returns the pairs of each micro-batch, ascending. A group that fits is not split; a pair never is.
std::vector<std::vector<int64_t>> plan_batches(const Groups& groups, const Limits& limits);

// Sizes of the arrays of one micro-batch.
struct BatchShape {
  int64_t tokens = 0, targets = 0, segments = 0, sequences = 0, pairs = 0;  // T, N, G, S, P
  int64_t padded_tokens = 0;                                                // 2 * P * the longest prompt + response

  // input_ids (T), position_ids (T), logit_rows (N), targets (N), pair_examples (P), in this order
  int64_t longs() const { return 2 * tokens + 2 * targets + pairs; }
  // cu_seqlens_q (G + 1), prefixes (G, 2), cu_targets (S + 1), pairs (P, 2), in this order
  int64_t ints() const { return 3 * segments + 1 + sequences + 1 + 2 * pairs; }
};

// Contents of all micro-batches, from which fill() writes their arrays. References the groups, and through them the
// tokens, without owning them.
struct Layout {
  const Groups& groups;
  std::vector<BatchShape> shapes;
  std::vector<int64_t> branches;   // of every micro-batch, one after another: (sum of S), indices into groups.branches
  std::vector<int64_t> pairs;      // likewise (sum of P), indices into groups.pairs
  std::vector<int32_t> sequences;  // (sum of P, 2): the pairs' chosen and rejected sequence in their micro-batch
};

// Lays out each micro-batch: branches are grouped by prompt, groups and branches in order of first use by its pairs.
Layout lay_out(const Groups& groups, const std::vector<std::vector<int64_t>>& plan);

// Writes the arrays of all micro-batches one after another: `longs` has room for the sum of longs(), `ints` for the sum
// of ints().
void fill(const Layout& layout, int64_t* longs, int32_t* ints, int64_t threads);

}  // namespace dpofast
