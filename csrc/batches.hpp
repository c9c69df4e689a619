// Groups -> micro-batches: assigns comparisons to micro-batches and writes the arrays of each. Pure C++17, no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "groups.hpp"
#include "planner.hpp"
#include "trie.hpp"

namespace dpofast {

// Sizes of the arrays of one micro-batch.
struct BatchShape {
  int64_t tokens = 0, targets = 0, segments = 0, sequences = 0, comparisons = 0;  // T, N, G, S, P
  int64_t width = 0;          // K, the most members of a list; 0 for pairs
  int64_t padded_tokens = 0;  // members of all comparisons * the longest prompt + response

  // input_ids (T), position_ids (T), logit_rows (N), targets (N), pair_examples (P), in this order
  int64_t longs() const { return 2 * tokens + 2 * targets + comparisons; }
  // cu_seqlens_q (G + 1), parents (G), cu_targets (S + 1), pairs (P, 2), lists (P, K), ranks (P, K), in this order
  int64_t ints() const { return 2 * segments + 1 + sequences + 1 + 2 * comparisons * (1 + width); }
};

// What one micro-batch holds.
struct Batch {
  std::vector<int64_t> comparisons;  // (P,) ascending, in input order
  std::vector<int64_t> branches;     // (S,) indices into groups.branches
  std::vector<int32_t> sequences;    // the members of all comparisons, places in `branches`
  Trie trie;
  BatchShape shape;
};

// Lays out a partition of the comparisons, largest micro-batch first, equal ones by their first comparison: branches
// are ordered by group, groups and branches in order of first use by its comparisons. Throws PackingError for a
// micro-batch beyond int32.
std::vector<Batch> lay_out(const Groups& groups, std::vector<std::vector<int64_t>> plan, int64_t threads);

// Plans micro-batches within the limits and lays them out. A group that fits is not split; a comparison never is. Where
// sequences may share any prefix, groups that begin alike are put together if that leaves fewer rows.
std::vector<Batch> make_batches(const Groups& groups, const Limits& limits, int64_t threads);

// Writes the arrays of all micro-batches one after another: `longs` has room for the sum of longs(), `ints` for the sum
// of ints().
void fill(const Groups& groups, const std::vector<Batch>& batches, int64_t* longs, int32_t* ints, int64_t threads);

}  // namespace dpofast
