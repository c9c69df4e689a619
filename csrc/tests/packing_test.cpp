// Unit tests of the packer's core, without Python. Prints failures and then exits with 1.
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../batches.hpp"

using namespace dpofast;

namespace {

int failures = 0;

template <typename T>
std::string text(const std::vector<T>& values) {
  std::string joined;
  for (const T& value : values) joined += std::to_string(value) + " ";
  return joined;
}
std::string text(const std::string& value) { return value; }
std::string text(int64_t value) { return std::to_string(value); }

template <typename T>
void expect(const char* what, const T& found, const T& expected) {
  if (found == expected) return;
  std::printf("%s: expected %s, got %s\n", what, text(expected).c_str(), text(found).c_str());
  ++failures;
}

void expect_error(const char* what, const std::string& message, const std::function<void()>& call) {
  std::string found = "no error";
  try {
    call();
  } catch (const PackingError& error) {
    found = error.what();
  }
  expect(what, found.find(message) == std::string::npos ? found : message, message);
}

// Pairs as prompt, chosen, rejected, or lists as a prompt and responses, best first; odd sequences as int32.
struct Table {
  std::vector<std::vector<int64_t>> wide;
  std::vector<std::vector<int32_t>> narrow;
  std::vector<Sequence> sequences;
  std::vector<int64_t> branch_counts, comparison_counts, members, member_counts, ranks, variants;
  std::vector<uint8_t> forms;

  // `counts`: the responses of each list; none for pairs. Responses have the ranks 0, 1, 2, ...
  explicit Table(const std::vector<std::vector<int64_t>>& ids, const std::vector<int64_t>& counts = {})
      : wide(ids), member_counts(counts) {
    narrow.reserve(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      narrow.emplace_back(ids[i].begin(), ids[i].end());
      const int64_t length = ids[i].size();
      sequences.push_back(i % 2 ? Sequence{narrow[i].data(), length, false} : Sequence{wide[i].data(), length, true});
    }
    branch_counts = counts.empty() ? std::vector<int64_t>(ids.size() / 3, 2) : counts;
    comparison_counts.assign(branch_counts.size(), 1);
    forms.assign(branch_counts.size(), static_cast<uint8_t>(counts.empty() ? Form::kPair : Form::kList));
    for (const int64_t branches : branch_counts) {
      for (int64_t k = 0; k < branches; ++k) members.push_back(k);
    }
    if (!counts.empty()) ranks = members;
  }

  Examples examples() const {
    const auto span = [](const auto& values) {
      return Span<std::decay_t<decltype(values[0])>>{values.data(), static_cast<int64_t>(values.size())};
    };
    return {span(sequences),     span(branch_counts), span(comparison_counts), span(members),
            span(member_counts), span(ranks),         span(variants),          span(forms)};
  }
};

void test_design_example() {
  const Table table({{10, 11, 12}, {20, 21}, {30, 31, 32}});
  const Groups groups = group_examples(table.examples(), Share::kPrompt, 100, 1);
  const std::vector<Batch> batches = make_batches(groups, {100, 100}, 1);
  expect<int64_t>("batches", batches.size(), 1);
  const BatchShape& shape = batches[0].shape;
  std::vector<int64_t> longs(shape.longs());
  std::vector<int32_t> ints(shape.ints());
  fill(groups, batches, longs.data(), ints.data(), 2);
  expect<std::vector<int64_t>>("longs", longs,
                               {10, 11, 12, 20, 30, 31, 0, 1, 2, 3, 3, 4, 2, 3, 2, 4, 5, 20, 21, 30, 31, 32, 0});
  expect<std::vector<int32_t>>("ints", ints, {0, 3, 4, 6, -1, 0, 0, 0, 2, 5, 0, 1});
  expect<int64_t>("padded_tokens", shape.padded_tokens, 12);
}

void test_equal_ids_of_either_width_are_one() {
  const Table table({{7, 8}, {1}, {2}, {7, 8}, {2}, {1, 2, 3, 4, 5, 6, 7, 8, 9}});
  const Groups groups = group_examples(table.examples(), Share::kPrompt, 100, 1);
  expect<int64_t>("groups", groups.prompts.size(), 1);
  expect<int64_t>("branches", groups.branches.size(), 3);
  expect<std::vector<int64_t>>("canonical", groups.canonical, {0, 1, 2, 0, 2, 5});
}

// Responses of one token but the last, which has two: P + sum(K branches - 1) = 2 + 1 rows.
void test_a_list_stands_beside_its_best_and_worst() {
  Table table({{7, 8}, {3}, {1}, {2, 9}, {7, 8}, {1}, {3}}, {3, 2});
  std::swap(table.members[0], table.members[2]);  // the best is response 2
  table.ranks[1] = table.ranks[2] = 1;
  const Groups groups = group_examples(table.examples(), Share::kPrefix, 100, 1);
  const std::vector<Batch> batches = make_batches(groups, {}, 1);
  const BatchShape& shape = batches[0].shape;
  std::vector<int64_t> longs(shape.longs());
  std::vector<int32_t> ints(shape.ints());
  fill(groups, batches, longs.data(), ints.data(), 1);
  expect<std::vector<int64_t>>("list longs", longs, {7, 8, 2, 0, 1, 2, 1, 2, 1, 1, 2, 9, 1, 3, 0, 1});
  // cu_seqlens_q, parents, cu_targets; pairs; lists; ranks
  expect<std::vector<int32_t>>("list ints", ints,
                               {0, 3, -1, 0, 2, 3, 4, 0, 2, 1, 2, 0, 1, 2, 1, 2, -1, 0, 1, 1, 0, 1, -1});
  expect<int64_t>("list padded_tokens", shape.padded_tokens, 5 * 4);
}

void test_a_list_is_never_split() {
  const Table table({{1}, {2, 2}, {3, 3}, {4, 4}, {1}, {5, 5}, {6, 6}}, {3, 2});
  const Groups groups = group_examples(table.examples(), Share::kPrefix, 100, 1);
  for (const int64_t limit : {1, 2, 3, 4, 5}) {
    const std::vector<Batch> batches = make_batches(groups, {limit, kUnlimited}, 1);
    expect<int64_t>("lists apart", batches.size(), 2);
    expect<std::vector<int64_t>>("list of three", {batches[0].shape.tokens, batches[0].shape.width}, {4, 3});
    expect<std::vector<int64_t>>("list of two", {batches[1].shape.tokens, batches[1].shape.width}, {3, 2});
  }
  expect<int64_t>("lists together", make_batches(groups, {6, kUnlimited}, 1).size(), 1);
}

void test_variants_of_a_response_are_branches_that_share_their_rows() {
  Table table({{7, 8}, {1, 2, 3}, {4, 5}, {7, 8}, {1, 2, 3}, {4, 5}});
  table.variants = {0, 0, 0, 0, 5, 0};
  for (const Share share : {Share::kPrefix, Share::kPrompt, Share::kNone}) {
    const Groups groups = group_examples(table.examples(), share, 100, 1);
    expect<std::vector<int64_t>>("canonical of variants", groups.canonical, {0, 1, 2, 0, 4, 2});
    const Batch batch = make_batches(groups, {}, 1)[0];
    const int64_t rows = share == Share::kPrefix ? 2 + 2 + 1 : share == Share::kPrompt ? 2 + 2 + 2 + 1 : 4 + 4 + 3;
    expect<std::vector<int64_t>>("rows of variants", {batch.shape.tokens, batch.shape.sequences, batch.shape.targets},
                                 {rows, 3, 8});
  }
}

void test_errors() {
  const auto group = [](const Table& table) { group_examples(table.examples(), Share::kPrompt, 100, 1); };
  expect_error("empty", "examples[0]: chosen_ids is empty", [&] { group(Table({{1}, {}, {2}})); });
  expect_error("negative", "examples[0]: prompt_ids[1] is -4", [&] { group(Table({{1, -4}, {1}, {2}})); });
  expect_error("negative int32", "examples[0]: chosen_ids[0] is -1", [&] { group(Table({{1}, {-1}, {2}})); });
  expect_error("vocabulary", "examples[1]: rejected_ids[9] is 100; expected a token id of 0 or more and below",
               [&] { group(Table({{1}, {2}, {3}, {1}, {2}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 100}})); });
  expect_error("equal", "form a pair but are equal", [&] { group(Table({{1}, {2, 3}, {2, 3}})); });
  Table table({{1}, {2}, {3}});
  table.branch_counts[0] = int64_t{1} << 62;
  expect_error("counts", "examples[0]: branch_counts and comparison_counts go beyond", [&] { group(table); });
  Table weighted({{1}, {2, 3}, {2, 3}});
  weighted.variants = {0, 0, 1};
  expect_error("equal but for weights", "form a pair but are equal", [&] { group(weighted); });
  Table list({{1}, {2, 3}, {4}, {2, 3}}, {3});
  expect_error("equal in a list", "responses_ids[0] and responses_ids[2] are equal but of different rank",
               [&] { group(list); });
  list.variants = {0, 0, 0, 1};
  expect_error("equal in a list but for weights", "equal but of different rank", [&] { group(list); });
  list.ranks = {0, 1, 0};
  expect_error("ranks", "examples[0]: ranks: expected them to go up from 0 by steps of 1, got 0 after 1",
               [&] { group(list); });
  list.ranks = {0, 0, 0};
  expect_error("tied", "examples[0]: ranks: all responses are tied", [&] { group(list); });
  list.member_counts = {1, 2};
  expect_error("short", "member_counts are below 2 or go beyond members", [&] { group(list); });
  expect_error("positions", "int32 positions allow", [] { check_positions(kMaxPositions + 1, 0); });
  const auto plan = [](const Items& items, const Limits& limits, int64_t ranks) {
    check_plan_arguments(items, limits, ranks);
  };
  expect_error("sizes", "lengths[1] is 0", [&] { plan({{1, 0}, {}}, {}, 1); });
  expect_error("limit", "max_tokens: expected 1 or more, got -5", [&] { plan({{1}, {}}, {-5}, 1); });
  expect_error("ranks", "ranks: expected 1 or more, got 0", [&] { plan({{1}, {}}, {}, 0); });
  expect_error("too many ranks", "ranks: expected at most 1048576", [&] { plan({{1}, {}}, {}, kMaxRanks + 1); });
  expect_error("targets", "targets: expected 2, one a length, got 1", [&] { plan({{1, 2}, {1}}, {}, 1); });
  expect_error("no targets", "targets: expected one a length with", [&] { plan({{1}, {}}, {kUnlimited, 9}, 1); });
}

void test_planner() {
  expect<std::vector<int64_t>>("even", pack_evenly({std::vector<int64_t>(8, 268), {}}, {2000, kUnlimited}).loads,
                               {1072, 1072});
  // Best-fit decreasing needs three: 4 + 4, 3 + 3 + 3 and 3.
  const Items hard{{4, 4, 3, 3, 3, 3}, {}};
  expect<int64_t>("best fit", best_fit_decreasing(hard, {10, kUnlimited}).loads.size(), 3);
  expect<int64_t>("harder", pack_evenly(hard, {10, kUnlimited}).loads.size(), 2);
  expect<std::vector<int64_t>>("targets", pack_evenly({{5, 5, 5, 5}, {3, 3, 3, 3}}, {100, 6}).loads, {10, 10});
  expect<std::vector<int64_t>>("oversized by targets", pack_evenly({{5, 5}, {9, 3}}, {100, 6}).loads, {5, 5});
  const RankedBins ranked = plan_ranks({{8, 8, 8, 1}, {}}, {8, kUnlimited}, 2, true);
  expect<std::vector<int64_t>>("equal counts", ranked.rank_bounds, {0, 2, 4});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 20000; ++i) sizes.push_back(100 + i * 7919 % 1900);
  const Items epoch{sizes, {}};
  expect<int64_t>("lower bound of an epoch", pack_evenly(epoch, {16384, kUnlimited}).loads.size(),
                  lower_bound(epoch, {16384, kUnlimited}));
}

}  // namespace

int main() {
  test_design_example();
  test_equal_ids_of_either_width_are_one();
  test_a_list_stands_beside_its_best_and_worst();
  test_a_list_is_never_split();
  test_variants_of_a_response_are_branches_that_share_their_rows();
  test_errors();
  test_planner();
  if (failures == 0) std::printf("all passed\n");
  return failures != 0;
}
