// Fuzz test of the packer's core with random and damaged inputs: it must throw PackingError or satisfy all invariants.
// Built with sanitizers (make fuzz). Usage: fuzz CASES [FIRST_SEED]; a violation is printed with the seed to repeat it.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "../batches.hpp"
#include "../prefixes.hpp"

using namespace dpofast;

namespace {

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t count) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }
};

int64_t current_seed = 0;

void require(bool kept, const char* what) {
  if (kept) return;
  std::printf("broken promise with seed %lld: %s\n", static_cast<long long>(current_seed), what);
  std::exit(1);
}

// Examples in buffers of exactly the required size, so that the sanitizer catches a read beyond the end.
struct Input {
  std::vector<std::unique_ptr<int64_t[]>> wide;
  std::vector<std::unique_ptr<int32_t[]>> narrow;
  std::vector<Sequence> sequences;
  std::vector<int64_t> branch_counts, comparison_counts, members, member_counts, ranks, variants;
  std::vector<uint8_t> forms;

  void add_sequence(Random& random, int64_t length, int64_t vocab, int64_t first) {
    const bool is_wide = random.one_in(2);
    if (is_wide)
      wide.emplace_back(new int64_t[length]);
    else
      narrow.emplace_back(new int32_t[length]);
    // Sequences often begin like an earlier one.
    const Sequence* const like =
        sequences.empty() || random.one_in(2) ? nullptr : &sequences[random.below(sequences.size())];
    const int64_t same = like ? std::min(like->length, random.below(length + 1)) : 0;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t id = i == 0 && first ? first : i < same ? (*like)[i] : random.below(vocab);
      if (is_wide)
        wide.back()[i] = id;
      else
        narrow.back()[i] = static_cast<int32_t>(id);
    }
    sequences.push_back({is_wide ? static_cast<void*>(wide.back().get()) : narrow.back().get(), length, is_wide});
  }

  Examples examples() const {
    const auto span = [](const auto& values) {
      return Span<std::decay_t<decltype(values[0])>>{values.data(), static_cast<int64_t>(values.size())};
    };
    return {span(sequences),     span(branch_counts), span(comparison_counts), span(members),
            span(member_counts), span(ranks),         span(variants),          span(forms)};
  }
};

// Few ids and short sequences, so that equal prompts and responses are frequent. Branch k mostly starts with id k,
// since an example with a pair of equal branches is rejected.
Input draw(Random& random) {
  Input input;
  const bool lists = random.one_in(2);
  const int64_t examples = random.below(9), longest = random.one_in(8) ? 40 : 5;
  for (int64_t e = 0; e < examples; ++e) {
    const int64_t branches = random.one_in(2) ? 2 : 2 + random.below(4);
    const bool distinct = !random.one_in(16);
    for (int64_t k = 0; k <= branches; ++k) {
      input.add_sequence(random, random.one_in(500) ? 0 : 1 + random.below(longest), 2 + random.below(2),
                         distinct ? k : 0);
    }
    input.branch_counts.push_back(branches);
    input.forms.push_back(static_cast<uint8_t>(lists ? Form::kList : branches != 2 ? Form::kGroup : Form::kPair));
    if (lists) {
      // The branches in any order, with ties.
      input.comparison_counts.push_back(1);
      input.member_counts.push_back(branches);
      int64_t rank = 0;
      for (int64_t k = 0; k < branches; ++k) {
        input.members.push_back(k);
        input.ranks.push_back(k == 0 ? 0 : k == branches - 1 && rank == 0 ? 1 : rank += random.below(2));
      }
      std::shuffle(input.members.end() - branches, input.members.end(), random.engine);
      continue;
    }
    const auto add_pair = [&](int64_t chosen, int64_t rejected) {
      input.members.insert(input.members.end(), {chosen, rejected});
    };
    for (int64_t k = 1; k < branches; ++k) add_pair(k - 1, k);
    const int64_t more = random.below(4);
    for (int64_t p = 0; p < more; ++p) {
      const int64_t chosen = random.below(branches);
      add_pair(chosen, (chosen + 1 + random.below(branches - 1)) % branches);
    }
    input.comparison_counts.push_back(branches - 1 + more);
  }
  if (random.one_in(2)) {
    for (size_t i = 0; i < input.sequences.size(); ++i) input.variants.push_back(random.below(3));
  }
  return input;
}

void damage(Random& random, Input& input) {
  static constexpr int64_t kValues[] = {-1,
                                        0,
                                        1,
                                        2,
                                        7,
                                        int64_t{1} << 31,
                                        int64_t{1} << 62,
                                        -(int64_t{1} << 62),
                                        std::numeric_limits<int64_t>::max(),
                                        std::numeric_limits<int64_t>::min()};
  const int64_t value = kValues[random.below(10)];
  const auto strike = [&](std::vector<int64_t>& values) {
    if (values.empty()) return;
    if (random.one_in(3))
      values.resize(random.below(values.size()));
    else
      values[random.below(values.size())] = value;
  };
  switch (random.below(9)) {
    case 0:
      return strike(input.branch_counts);
    case 1:
      return strike(input.comparison_counts);
    case 2:
      return strike(input.members);
    case 3:
      return input.sequences.resize(input.sequences.size() / 2);
    case 4:
      return input.forms.resize(input.forms.size() / 2);
    case 5:
      return strike(input.member_counts);
    case 6:
      return strike(input.ranks);
    case 7:
      return strike(input.variants);
    default:
      for (const Sequence& sequence : input.sequences) {
        if (sequence.wide && sequence.length && random.one_in(2)) {
          const_cast<int64_t*>(static_cast<const int64_t*>(sequence.data))[random.below(sequence.length)] = value;
        }
      }
  }
}

bool is_target(const Sequence& response, const int64_t* targets) {
  for (int64_t i = 0; i < response.length; ++i) {
    if (response[i] != targets[i]) return false;
  }
  return true;
}

// Distinct beginnings of branches without their last tokens: the rows of their trie.
int64_t distinct_beginnings(const Groups& groups, const std::vector<int64_t>& branches) {
  std::set<std::vector<int64_t>> beginnings;
  for (size_t s = 0; s < branches.size(); ++s) {
    const Branch& branch = groups.branches[branches[s]];
    const auto &prompt = groups.examples.sequences[groups.prompts[branch.group].sequence],
               &response = groups.examples.sequences[branch.sequence];
    // What keeps sequences apart that may not share: the group, and where nothing is shared the sequence.
    std::vector<int64_t> path;
    if (groups.share == Share::kPrompt) path = {branch.group, 0};
    if (groups.share == Share::kNone) path = {static_cast<int64_t>(s), 0};
    const auto add = [&](int64_t token) {
      path.push_back(token);
      beginnings.insert(path);
    };
    for (int64_t i = 0; i < prompt.length; ++i) add(prompt[i]);
    if (groups.share == Share::kPrompt) path[1] = 1 + static_cast<int64_t>(s);
    for (int64_t i = 0; i + 1 < response.length; ++i) add(response[i]);
  }
  return beginnings.size();
}

// Checks every batch against the sequences it was made from.
void check_batches(const Groups& groups, const std::vector<Batch>& batches, const int64_t* longs, const int32_t* ints) {
  const auto& sequences = groups.examples.sequences;
  for (const Batch& batch : batches) {
    const BatchShape& shape = batch.shape;
    const int64_t* branch = batch.branches.data();
    require(shape.tokens == distinct_beginnings(groups, batch.branches), "rows are the distinct beginnings");
    const int64_t *ids = longs, *positions = ids + shape.tokens, *rows = positions + shape.tokens,
                  *targets = rows + shape.targets;
    const int32_t *cu_seqlens = ints, *parents = cu_seqlens + shape.segments + 1,
                  *cu_targets = parents + shape.segments, *pairs = cu_targets + shape.sequences + 1;
    require(cu_seqlens[0] == 0 && cu_seqlens[shape.segments] == shape.tokens, "segments cover the rows");
    for (int64_t g = 0; g < shape.segments; ++g) {
      require(cu_seqlens[g] < cu_seqlens[g + 1], "segments have rows");
      require(-1 <= parents[g] && parents[g] < g, "parents come before their segments");
    }
    // The row before each row on its path, -1 for the first.
    std::vector<int64_t> before(shape.tokens);
    for (int64_t g = 0; g < shape.segments; ++g) {
      for (int64_t row = cu_seqlens[g]; row < cu_seqlens[g + 1]; ++row) before[row] = row - 1;
      before[cu_seqlens[g]] = parents[g] < 0 ? -1 : cu_seqlens[parents[g] + 1] - 1;
    }
    require(cu_targets[0] == 0 && cu_targets[shape.sequences] == shape.targets, "sequences cover the targets");
    for (int64_t s = 0; s < shape.sequences; ++s, ++branch) {
      const Branch& found = groups.branches[*branch];
      const Sequence &prompt = sequences[groups.prompts[found.group].sequence], &response = sequences[found.sequence];
      const int64_t first = cu_targets[s];
      require(cu_targets[s + 1] - first == response.length && is_target(response, targets + first), "targets");
      for (int64_t i = 0; i < response.length; ++i) {
        const int64_t row = rows[first + i];
        require(row >= 0 && row < shape.tokens, "logit rows");
        require(positions[row] == prompt.length - 1 + i, "positions");
        require(ids[row] == (i ? response[i - 1] : prompt[prompt.length - 1]), "input ids");
      }
      int64_t row = rows[first + response.length - 1];
      for (int64_t i = prompt.length + response.length - 2; i >= 0; --i, row = before[row]) {
        require(row >= 0 && positions[row] == i, "positions of a path");
        require(ids[row] == (i < prompt.length ? prompt[i] : response[i - prompt.length]), "tokens of a path");
        if (i >= prompt.length - 1) require(rows[first + i - prompt.length + 1] == row, "logit rows lie on the path");
      }
      require(row == -1, "a path begins at a root");
    }
    const int32_t *lists = pairs + 2 * shape.comparisons, *ranks = lists + shape.comparisons * shape.width;
    for (int64_t p = 0; p < shape.comparisons; ++p) {
      const auto members = groups.members_of(batch.comparisons[p]);
      const auto is = [&](int64_t sequence, int64_t member) {
        return 0 <= sequence && sequence < shape.sequences && batch.branches[sequence] == member;
      };
      require(is(pairs[2 * p], members[0]) && is(pairs[2 * p + 1], members[members.size - 1]), "pairs");
      for (int64_t k = 0; k < shape.width; ++k) {
        const int32_t sequence = lists[p * shape.width + k], rank = ranks[p * shape.width + k];
        const int64_t first = groups.first_member(batch.comparisons[p]);
        require(k < members.size ? is(sequence, members[k]) : sequence == -1, "lists");
        require(rank == (k < members.size ? groups.examples.ranks[first + k] : -1), "ranks");
      }
    }
    longs += shape.longs();
    ints += shape.ints();
  }
}

void check_pack(Random& random, const Input& input) {
  const Share share = std::array{Share::kNone, Share::kPrompt, Share::kPrefix, Share::kPrefix}[random.below(4)];
  const Limits limits{random.one_in(8) ? kUnlimited : 1 + random.below(60),
                      random.one_in(2) ? kUnlimited : 1 + random.below(30)};
  const int64_t threads = 1 + random.below(3);
  const Groups groups = group_examples(input.examples(), share, random.one_in(50) ? 2 : 1000, threads);
  const std::vector<Batch> batches = make_batches(groups, limits, threads);
  int64_t long_count = 0, int_count = 0;
  std::vector<int64_t> seen(groups.comparisons(), 0);
  for (const Batch& batch : batches) {
    const BatchShape& shape = batch.shape;
    long_count += shape.longs();
    int_count += shape.ints();
    int64_t largest_tokens = 0, largest_targets = 0;
    for (const int64_t q : batch.comparisons) {
      ++seen[q];
      std::vector<int64_t> members(groups.members_of(q).begin(), groups.members_of(q).end());
      std::sort(members.begin(), members.end());
      members.erase(std::unique(members.begin(), members.end()), members.end());
      int64_t targets = 0;
      for (const int64_t id : members) targets += groups.branches[id].length;
      largest_tokens = std::max(largest_tokens, distinct_beginnings(groups, members));
      largest_targets = std::max(largest_targets, targets);
    }
    // A micro-batch beyond a limit holds one comparison, and those that add nothing to it.
    require(shape.tokens <= limits.tokens || shape.tokens == largest_tokens, "max_tokens");
    require(shape.targets <= limits.targets || shape.targets == largest_targets, "max_targets");
  }
  require(std::all_of(seen.begin(), seen.end(), [](int64_t times) { return times == 1; }), "every comparison once");
  const std::unique_ptr<int64_t[]> longs(new int64_t[long_count]);
  const std::unique_ptr<int32_t[]> ints(new int32_t[int_count]);
  fill(groups, batches, longs.get(), ints.get(), threads);
  check_batches(groups, batches, longs.get(), ints.get());
}

// The order of sequences against std::lexicographical_compare, and bins of items that pay for what they share once.
void check_prefixes(Random& random) {
  Input input;
  const int64_t count = random.below(30), longest = random.one_in(4) ? 40 : 6;
  for (int64_t i = 0; i < count; ++i) input.add_sequence(random, random.below(longest), 2, 0);
  const auto tokens = [&](int64_t index) {
    const Sequence& sequence = input.sequences[index];
    std::vector<int64_t> values;
    for (int64_t i = 0; i < sequence.length; ++i) values.push_back(sequence[i]);
    return values;
  };
  const Lexicographic sorted = sort_lexicographically(input.sequences);
  Items items;
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int64_t> here = tokens(sorted.order[i]);
    if (i > 0) {
      const std::vector<int64_t> before = tokens(sorted.order[i - 1]);
      require(before < here || (before == here && sorted.order[i - 1] < sorted.order[i]), "lexicographic order");
      const int64_t end = std::min(before.size(), here.size());
      const int64_t same = std::mismatch(before.begin(), before.begin() + end, here.begin()).first - before.begin();
      require(sorted.common[i] == same, "common beginnings");
    }
    items.tokens.push_back(here.size() + 1 + random.below(longest));
  }
  Limits limits{random.one_in(8) ? kUnlimited : 1 + random.below(4 * longest), kUnlimited};
  if (random.one_in(3)) {
    for (int64_t i = 0; i < count; ++i) items.targets.push_back(1 + random.below(longest));
    limits.targets = 1 + random.below(2 * longest);
  }
  const Bins bins = pack_by_prefix(items, sorted.common, limits);
  const int64_t bin_count = bins.loads.size();
  std::vector<int64_t> loads(bin_count, 0), targets(bin_count, 0), members(bin_count, 0), shared(bin_count, 0);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t& common : shared) common = std::min(common, sorted.common[i]);
    const int64_t bin = bins.bin_of[i];
    require(0 <= bin && bin < bin_count, "bins by prefix");
    loads[bin] += items.tokens[i] - (members[bin] ? shared[bin] : 0);
    if (!items.targets.empty()) targets[bin] += items.targets[i];
    ++members[bin];
    shared[bin] = kUnlimited;  // what the next item of the bin shares with this one
  }
  for (int64_t b = 0; b < bin_count; ++b) {
    require(members[b] > 0, "empty bins by prefix");
    require(loads[b] <= bins.loads[b], "loads by prefix");
    require(members[b] == 1 || (bins.loads[b] <= limits.tokens && targets[b] <= limits.targets), "limits by prefix");
  }
}

void check_plan(Random& random) {
  const int64_t longest = random.one_in(4) ? 20000 : 40;
  Items items;
  const int64_t count = random.one_in(2000) ? kEvenItems + random.below(2000) : random.below(60);
  for (int64_t i = 0; i < count; ++i) items.tokens.push_back(1 + random.below(longest));
  Limits limits{random.one_in(8) ? kUnlimited : 1 + random.below(2 * longest), kUnlimited};
  if (random.one_in(3)) {
    for (int64_t i = 0; i < count; ++i) items.targets.push_back(1 + random.below(longest));
    limits.targets = 1 + random.below(2 * longest);
  }
  const int64_t ranks = 1 + random.below(4);
  check_plan_arguments(items, limits, ranks);
  const bool equal_counts = random.one_in(2);
  const RankedBins plan = plan_ranks(items, limits, ranks, equal_counts);
  const int64_t bins = plan.bins.loads.size();
  std::vector<int64_t> loads(bins, 0), targets(bins, 0), members(bins, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bin = plan.bins.bin_of[i];
    require(0 <= bin && bin < bins, "bins");
    loads[bin] += items.tokens[i];
    if (!items.targets.empty()) targets[bin] += items.targets[i];
    ++members[bin];
  }
  require(loads == plan.bins.loads, "loads");
  for (int64_t b = 0; b < bins; ++b) {
    require(members[b] == 1 || (loads[b] <= limits.tokens && targets[b] <= limits.targets), "limits");
    require(members[b] > 0 || equal_counts, "empty bins");
  }
  require(static_cast<int64_t>(plan.rank_bounds.size()) == ranks + 1 && plan.rank_bounds[ranks] == bins, "ranks");
  if (equal_counts) {
    for (int64_t r = 0; r < ranks; ++r) {
      require(plan.rank_bounds[r + 1] - plan.rank_bounds[r] == plan.rank_bounds[1], "equal counts");
    }
  }
  if (ranks == 1) {
    std::shuffle(items.tokens.begin(), items.tokens.end(), random.engine);
    if (items.targets.empty()) {
      require(plan_ranks(items, limits, 1, false).bins.loads == loads, "order independence");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000, first = argc > 2 ? std::atoll(argv[2]) : 0;
  int64_t refused = 0;
  for (int64_t seed = first; seed < first + cases; ++seed) {
    current_seed = seed;
    Random random{std::mt19937_64(static_cast<uint64_t>(seed))};
    Input input = draw(random);
    const bool damaged = random.one_in(4);
    if (damaged) damage(random, input);
    try {
      check_pack(random, input);
    } catch (const PackingError&) {
      ++refused;
    }
    check_plan(random);
    check_prefixes(random);
  }
  std::printf("%lld cases, %lld refused, no promise broken\n", static_cast<long long>(cases),
              static_cast<long long>(refused));
  return 0;
}
