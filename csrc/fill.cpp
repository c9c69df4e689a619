#include <algorithm>
#include <utility>

#include "batches.hpp"
#include "parallel.hpp"

namespace dpofast {
namespace {

int64_t* write_range(int64_t* out, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = first + i;
  return out + count;
}

// The rows at positions [first, last] of the path that ends in a piece, written to `rows`.
void write_path(const Trie& trie, int32_t piece, int64_t first, int64_t last, int64_t* rows) {
  while (last >= first) {
    const Piece& part = trie.pieces[piece];
    const int64_t begin = std::max(first, part.position);
    write_range(rows + (begin - first), part.row + (begin - part.position), last + 1 - begin);
    last = begin - 1;
    piece = part.parent;
  }
}

// The lists of a micro-batch with their ranks, both filled with -1, and the first and the last of each as a pair. Not
// inlined: inside fill_one it makes the loops over tokens slower.
[[gnu::noinline]] void write_lists(const Groups& groups, const Batch& batch, int32_t* pairs, int32_t* lists,
                                   int32_t* ranks) {
  const int32_t* sequence = batch.sequences.data();
  for (const int64_t q : batch.comparisons) {
    const int64_t count = groups.members_of(q).size;
    const int64_t* rank = groups.examples.ranks.data + groups.first_member(q);
    *pairs++ = sequence[0];
    *pairs++ = sequence[count - 1];
    for (int64_t k = 0; k < batch.shape.width; ++k) {
      *lists++ = k < count ? *sequence++ : -1;
      *ranks++ = k < count ? static_cast<int32_t>(rank[k]) : -1;
    }
  }
}

void fill_one(const Groups& groups, const Batch& batch, int64_t* longs, int32_t* ints) {
  const BatchShape& shape = batch.shape;
  const auto& sequences = groups.examples.sequences;
  int64_t* ids = longs;
  int64_t* positions = longs + shape.tokens;
  int64_t* rows = positions + shape.tokens;
  int64_t* const first_target = rows + shape.targets;
  int64_t* targets = first_target;
  int64_t* examples = first_target + shape.targets;
  int32_t* cu_seqlens = ints;
  int32_t* parents = cu_seqlens + shape.segments + 1;
  int32_t* cu_targets = parents + shape.segments;
  int32_t* pairs = cu_targets + shape.sequences + 1;
  int32_t* lists = pairs + 2 * shape.comparisons;

  *cu_seqlens = 0;
  for (const Piece& piece : batch.trie.pieces) {
    ids = copy(sequences[piece.sequence], piece.begin, piece.length, ids);
    positions = write_range(positions, piece.position, piece.length);
    cu_seqlens[piece.segment + 1] = static_cast<int32_t>(ids - longs);  // the last piece of a segment has its end
  }
  std::copy(batch.trie.parents.begin(), batch.trie.parents.end(), parents);
  *cu_targets++ = 0;
  for (int64_t s = 0; s < shape.sequences; ++s) {
    const Branch& branch = groups.branches[batch.branches[s]];
    const Sequence& response = sequences[branch.sequence];
    // The last prompt row predicts the first response token; the last response token has no row.
    const int64_t first = groups.prompts[branch.group].length - 1;
    write_path(batch.trie, batch.trie.ends[s], first, first + response.length - 1, rows);
    rows += response.length;
    targets = copy(response, 0, response.length, targets);
    *cu_targets++ = static_cast<int32_t>(targets - first_target);
  }
  for (const int64_t q : batch.comparisons) *examples++ = groups.comparison_examples[q];
  if (shape.width > 0) {
    write_lists(groups, batch, pairs, lists, lists + shape.comparisons * shape.width);
  } else {
    std::copy(batch.sequences.begin(), batch.sequences.end(), pairs);
  }
}

}  // namespace

void fill(const Groups& groups, const std::vector<Batch>& batches, int64_t* longs, int32_t* ints, int64_t threads) {
  const int64_t count = batches.size();
  std::vector<std::pair<int64_t, int64_t>> places(1);
  for (const Batch& batch : batches) {
    places.emplace_back(places.back().first + batch.shape.longs(), places.back().second + batch.shape.ints());
  }
  parallel_ranges(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      fill_one(groups, batches[b], longs + places[b].first, ints + places[b].second);
  });
}

}  // namespace dpofast
