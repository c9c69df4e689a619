#include <algorithm>
#include <cstring>

#include "batches.hpp"
#include "parallel.hpp"

namespace dpofast {
namespace {

int64_t* write_range(int64_t* out, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = first + i;
  return out + count;
}

// One micro-batch: its shape, and the offsets of its branches and pairs in the layout.
struct Part {
  const BatchShape& shape;
  const int64_t* branches;
  const int64_t* pairs;
  const int32_t* sequences;
};

void fill_one(const Groups& groups, const Part& part, int64_t* longs, int32_t* ints) {
  const BatchShape& shape = part.shape;
  int64_t* const first_id = longs;
  int64_t* ids = first_id;
  int64_t* positions = first_id + shape.tokens;
  int64_t* rows = positions + shape.tokens;
  int64_t* const first_target = rows + shape.targets;
  int64_t* targets = first_target;
  int64_t* examples = first_target + shape.targets;
  int32_t* cu_seqlens = ints;
  int32_t* prefixes = cu_seqlens + shape.segments + 1;
  int32_t* cu_targets = prefixes + 2 * shape.segments;
  int32_t* pairs = cu_targets + shape.sequences + 1;

  *cu_seqlens++ = 0;
  *cu_targets++ = 0;
  int64_t open_group = -1, prompt_start = 0;
  for (int64_t s = 0; s < shape.sequences; ++s) {
    const Branch& branch = groups.branches[part.branches[s]];
    const Sequence& prompt = groups.examples.sequences[groups.prompts[branch.group]];
    const Sequence& response = groups.examples.sequences[branch.sequence];
    const bool new_prompt = branch.group != open_group || !groups.share_prompts;
    if (new_prompt) {
      open_group = branch.group;
      prompt_start = ids - first_id;
      ids = copy(prompt, prompt.length, ids);
      positions = write_range(positions, 0, prompt.length);
    }
    // The last prompt row predicts the first response token; the last response token has no row.
    *rows++ = prompt_start + prompt.length - 1;
    rows = write_range(rows, ids - first_id, response.length - 1);
    ids = copy(response, response.length - 1, ids);
    positions = write_range(positions, prompt.length, response.length - 1);
    targets = copy(response, response.length, targets);
    *cu_targets++ = static_cast<int32_t>(targets - first_target);
    if (new_prompt || response.length > 1) {
      const int32_t start = static_cast<int32_t>(prompt_start);
      *prefixes++ = new_prompt ? 0 : start;
      *prefixes++ = new_prompt ? 0 : start + static_cast<int32_t>(prompt.length);
      *cu_seqlens++ = static_cast<int32_t>(ids - first_id);
    }
  }
  for (int64_t p = 0; p < shape.pairs; ++p) examples[p] = groups.pairs[part.pairs[p]].example;
  std::memcpy(pairs, part.sequences, 2 * shape.pairs * sizeof(int32_t));
}

}  // namespace

Layout lay_out(const Groups& groups, const std::vector<std::vector<int64_t>>& plan) {
  Layout layout{groups, {}, {}, {}, {}};
  layout.shapes.reserve(plan.size());
  layout.branches.reserve(groups.branches.size());
  layout.pairs.reserve(groups.pairs.size());
  layout.sequences.reserve(2 * groups.pairs.size());
  // Indices of groups and branches within the current micro-batch, or -1.
  std::vector<int32_t> local_group(groups.prompts.size(), -1), local_branch(groups.branches.size(), -1);
  std::vector<int64_t> seen_groups;
  for (const std::vector<int64_t>& pairs : plan) {
    BatchShape shape;
    seen_groups.clear();
    const size_t first_branch = layout.branches.size();
    for (const int64_t q : pairs) {
      for (const int64_t id : {groups.pairs[q].chosen, groups.pairs[q].rejected}) {
        if (local_branch[id] >= 0) continue;
        local_branch[id] = 0;
        layout.branches.push_back(id);
        int32_t& group = local_group[groups.branches[id].group];
        if (group >= 0) continue;
        group = static_cast<int32_t>(seen_groups.size());
        seen_groups.push_back(groups.branches[id].group);
      }
    }
    const auto begin = layout.branches.begin() + first_branch, end = layout.branches.end();
    const auto group_order = [&](int64_t a, int64_t b) {
      return local_group[groups.branches[a].group] < local_group[groups.branches[b].group];
    };
    if (!std::is_sorted(begin, end, group_order)) std::stable_sort(begin, end, group_order);

    int64_t longest = 0, open_group = -1;
    for (auto id = begin; id != end; ++id) {
      const Branch& branch = groups.branches[*id];
      const int64_t prompt = groups.length(groups.prompts[branch.group]), response = groups.length(branch.sequence);
      const bool new_prompt = branch.group != open_group || !groups.share_prompts;
      open_group = branch.group;
      local_branch[*id] = static_cast<int32_t>(shape.sequences++);
      shape.tokens += groups.branch_cost(branch) + (new_prompt && groups.share_prompts ? prompt : 0);
      shape.targets += response;
      shape.segments += new_prompt || response > 1;
      longest = std::max(longest, prompt + response);
    }
    shape.pairs = pairs.size();
    shape.padded_tokens = 2 * shape.pairs * longest;
    check_positions(shape.tokens, shape.targets);
    layout.shapes.push_back(shape);
    for (const int64_t q : pairs) {
      layout.pairs.push_back(q);
      layout.sequences.push_back(local_branch[groups.pairs[q].chosen]);
      layout.sequences.push_back(local_branch[groups.pairs[q].rejected]);
    }
    for (auto id = begin; id != end; ++id) local_branch[*id] = -1;
    for (const int64_t group : seen_groups) local_group[group] = -1;
  }
  return layout;
}

void fill(const Layout& layout, int64_t* longs, int32_t* ints, int64_t threads) {
  struct Place {
    int64_t longs = 0, ints = 0, branches = 0, pairs = 0;
  };
  const int64_t count = layout.shapes.size();
  std::vector<Place> places(count + 1);
  for (int64_t b = 0; b < count; ++b) {
    const BatchShape& shape = layout.shapes[b];
    places[b + 1] = {places[b].longs + shape.longs(), places[b].ints + shape.ints(),
                     places[b].branches + shape.sequences, places[b].pairs + shape.pairs};
  }
  parallel_ranges(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Place& place = places[b];
      const Part part{layout.shapes[b], layout.branches.data() + place.branches, layout.pairs.data() + place.pairs,
                      layout.sequences.data() + 2 * place.pairs};
      fill_one(layout.groups, part, longs + place.longs, ints + place.ints);
    }
  });
}

}  // namespace dpofast
