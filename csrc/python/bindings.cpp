// dpofast._C: the packer for Python. Token data is read in place; the GIL is released while planning and filling.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../batches.hpp"
#include "../prefixes.hpp"
#include "sequences.hpp"

namespace py = pybind11;

namespace {

using dpofast::Array;

template <typename T>
dpofast::Span<T> span(const Array<T>& array) {
  return {array.data(), static_cast<int64_t>(array.size())};
}

// Throws PackingError for an array of another number of dimensions.
template <typename T>
void check_dimensions(const char* name, const Array<T>& array, py::ssize_t dimensions) {
  if (array.ndim() == dimensions) return;
  throw dpofast::PackingError(-1, std::string(name) + ": expected an array of " + std::to_string(dimensions) +
                                      " dimensions, got " + std::to_string(array.ndim()));
}

// Moves the vector into a numpy array without a copy.
template <typename T>
py::array to_numpy(std::vector<T>&& values) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule release(owner, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>({static_cast<py::ssize_t>(owner->size())}, owner->data(), release);
}

py::tuple plan(const Array<int64_t>& lengths, const std::optional<Array<int64_t>>& targets, int64_t max_tokens,
               int64_t max_targets, int64_t ranks, bool equal_counts) {
  const auto vector = [](const char* name, const Array<int64_t>& array) {
    check_dimensions(name, array, 1);
    return std::vector<int64_t>(array.data(), array.data() + array.size());
  };
  dpofast::Items items{vector("lengths", lengths), {}};
  if (targets) items.targets = vector("targets", *targets);
  if (targets && items.targets.empty() && items.count()) {
    throw dpofast::PackingError(-1, "targets: expected one a length, got none");
  }
  const dpofast::Limits limits{max_tokens, max_targets};
  dpofast::RankedBins ranked;
  std::vector<int64_t> members(items.tokens.size()), bounds;
  {
    py::gil_scoped_release nogil;
    dpofast::check_plan_arguments(items, limits, ranks);
    ranked = dpofast::plan_ranks(items, limits, ranks, equal_counts);
    for (const int64_t load : ranked.bins.loads) dpofast::check_positions(load, 0);
    bounds.assign(ranked.bins.loads.size() + 1, 0);
    for (const int64_t bin : ranked.bins.bin_of) ++bounds[bin + 1];
    for (size_t bin = 1; bin < bounds.size(); ++bin) bounds[bin] += bounds[bin - 1];
    std::vector<int64_t> next = bounds;
    for (size_t i = 0; i < members.size(); ++i) members[next[ranked.bins.bin_of[i]]++] = i;
  }
  return py::make_tuple(to_numpy(std::move(members)), to_numpy(std::move(bounds)),
                        to_numpy(std::move(ranked.bins.loads)), to_numpy(std::move(ranked.rank_bounds)));
}

py::array lexicographic_order(const std::shared_ptr<dpofast::Sequences>& sequences) {
  const auto ids = sequences->span();
  std::vector<int64_t> order;
  {
    py::gil_scoped_release nogil;
    for (int64_t i = 0; i < ids.size; ++i) {
      if (!dpofast::in_range(ids[i], dpofast::kTokenIds)) {
        throw dpofast::PackingError(i, "expected token ids that are not negative and below 2**31");
      }
    }
    order = dpofast::sort_lexicographically({ids.data, ids.data + ids.size}).order;
  }
  return to_numpy(std::move(order));
}

dpofast::Share read_share(const std::string& name) {
  if (name == "none") return dpofast::Share::kNone;
  if (name == "prompt") return dpofast::Share::kPrompt;
  if (name == "prefix") return dpofast::Share::kPrefix;
  throw dpofast::PackingError(-1, "share: expected prefix, prompt or none, got " + name);
}

// Groups, plans and lays out examples at construction; the arrays are written afterwards.
class Packer {
 public:
  Packer(std::shared_ptr<dpofast::Sequences> sequences, Array<int64_t> branch_counts, Array<int64_t> comparison_counts,
         Array<int64_t> members, Array<int64_t> member_counts, Array<int64_t> ranks, Array<int64_t> variants,
         Array<uint8_t> forms, int64_t max_tokens, int64_t max_targets, const std::string& share, int64_t vocab_size,
         int64_t threads)
      : sequences_(std::move(sequences)),
        branch_counts_(std::move(branch_counts)),
        comparison_counts_(std::move(comparison_counts)),
        members_(std::move(members)),
        member_counts_(std::move(member_counts)),
        ranks_(std::move(ranks)),
        variants_(std::move(variants)),
        forms_(std::move(forms)) {
    check_plan_arguments(max_tokens, max_targets, threads);
    dpofast::check_at_least_one("vocab_size", vocab_size);
    check_dimensions("branch_counts", branch_counts_, 1);
    check_dimensions("comparison_counts", comparison_counts_, 1);
    check_dimensions("members", members_, 1);
    check_dimensions("member_counts", member_counts_, 1);
    check_dimensions("ranks", ranks_, 1);
    check_dimensions("variants", variants_, 1);
    check_dimensions("forms", forms_, 1);
    const dpofast::Examples examples{sequences_->span(), span(branch_counts_), span(comparison_counts_),
                                     span(members_),     span(member_counts_), span(ranks_),
                                     span(variants_),    span(forms_)};
    const dpofast::Share shared = read_share(share);
    py::gil_scoped_release nogil;
    groups_ = dpofast::group_examples(examples, shared, vocab_size, threads);
    batches_ = dpofast::make_batches(groups_, {max_tokens, max_targets}, threads);
  }

  void plan(int64_t max_tokens, int64_t max_targets, int64_t threads) {
    check_plan_arguments(max_tokens, max_targets, threads);
    py::gil_scoped_release nogil;
    batches_ = dpofast::make_batches(groups_, {max_tokens, max_targets}, threads);
  }

  py::array shapes() const {
    py::array_t<int64_t> table({static_cast<py::ssize_t>(batches_.size()), py::ssize_t{7}});
    int64_t* row = table.mutable_data();
    for (const dpofast::Batch& batch : batches_) {
      const dpofast::BatchShape& shape = batch.shape;
      for (const int64_t value : {shape.tokens, shape.targets, shape.segments, shape.sequences, shape.comparisons,
                                  shape.width, shape.padded_tokens}) {
        *row++ = value;
      }
    }
    return table;
  }

  py::array sequences() const {
    std::vector<int64_t> first;
    for (const dpofast::Batch& batch : batches_) {
      for (const int64_t id : batch.branches) first.push_back(groups_.branches[id].sequence);
    }
    return to_numpy(std::move(first));
  }

  py::array canonical() const { return to_numpy(std::vector<int64_t>(groups_.canonical)); }

  void fill(Array<int64_t> longs, Array<int32_t> ints, int64_t threads) const {
    dpofast::check_at_least_one("threads", threads);
    int64_t long_count = 0, int_count = 0;
    for (const dpofast::Batch& batch : batches_) {
      long_count += batch.shape.longs();
      int_count += batch.shape.ints();
    }
    if (longs.size() < long_count || ints.size() < int_count) {
      throw dpofast::PackingError(
          -1, "longs and ints need " + std::to_string(long_count) + " and " + std::to_string(int_count) + " elements");
    }
    int64_t* const longs_at = longs.mutable_data();
    int32_t* const ints_at = ints.mutable_data();
    py::gil_scoped_release nogil;
    dpofast::fill(groups_, batches_, longs_at, ints_at, threads);
  }

 private:
  static void check_plan_arguments(int64_t max_tokens, int64_t max_targets, int64_t threads) {
    dpofast::check_at_least_one("max_tokens", max_tokens);
    dpofast::check_at_least_one("max_targets", max_targets);
    dpofast::check_at_least_one("threads", threads);
  }

  std::shared_ptr<dpofast::Sequences> sequences_;
  Array<int64_t> branch_counts_, comparison_counts_, members_, member_counts_, ranks_, variants_;
  Array<uint8_t> forms_;
  dpofast::Groups groups_;
  std::vector<dpofast::Batch> batches_;
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "dpofast's packer; use dpofast.packing. Bad input raises ValueError.";
  module.attr("UNLIMITED") = dpofast::kUnlimited;
  module.def("plan", &plan, py::arg("lengths").noconvert(), py::arg("targets").noconvert(), py::arg("max_tokens"),
             py::arg("max_targets"), py::arg("ranks"), py::arg("equal_counts"),
             "lengths (n,) int64 (targets the same, or None; limits and ranks 1 or more) -> item indices (n,), "
             "micro-batch after micro-batch; "
             "bounds (M + 1,) into them; loads (M,); rank bounds (R + 1,) into the micro-batches.");
  module.def("lexicographic_order", &lexicographic_order, py::arg("sequences").none(false),
             "(n,) int64: the sequences' indices, ascending by content, equal ones by index; ids in [0, 2**31).");
  py::class_<dpofast::Sequences, std::shared_ptr<dpofast::Sequences>>(module, "Sequences")
      .def("__len__", &dpofast::Sequences::size)
      .def("lengths", [](const dpofast::Sequences& self) { return to_numpy(self.lengths()); })
      .def_static("from_objects", &dpofast::Sequences::from_objects, py::arg("objects"), py::arg("convert"),
                  "A list of lists of ints and 1-D int32 or int64 arrays; anything else is handed to convert(index), "
                  "which returns a (n,) int64 array or raises.")
      .def_static("of_lists", &dpofast::Sequences::of_lists, py::arg("prompts").none(false),
                  py::arg("responses").none(false), py::arg("counts").noconvert(),
                  "The prompt of each row and the next counts[row] of the responses after it.")
      .def_static("from_columns", &dpofast::Sequences::from_columns, py::arg("columns"),
                  "Columns of equal length, each a list of chunks (values, offsets); sequence r * C + c is row r of "
                  "column c. Values and offsets are (n,) int32 or int64 arrays, which are read in place.");
  py::class_<Packer>(module, "Packer")
      .def(py::init<std::shared_ptr<dpofast::Sequences>, Array<int64_t>, Array<int64_t>, Array<int64_t>, Array<int64_t>,
                    Array<int64_t>, Array<int64_t>, Array<uint8_t>, int64_t, int64_t, const std::string&, int64_t,
                    int64_t>(),
           py::arg("sequences").none(false), py::arg("branch_counts").noconvert(),
           py::arg("comparison_counts").noconvert(), py::arg("members").noconvert(),
           py::arg("member_counts").noconvert(), py::arg("ranks").noconvert(), py::arg("variants").noconvert(),
           py::arg("forms").noconvert(), py::arg("max_tokens"), py::arg("max_targets"), py::arg("share"),
           py::arg("vocab_size"), py::arg("threads"), "csrc/groups.hpp describes the arrays.")
      .def("plan", &Packer::plan, py::arg("max_tokens"), py::arg("max_targets"), py::arg("threads"),
           "Plans and lays out the grouped examples again, with other limits.")
      .def_property_readonly("shapes", &Packer::shapes, "(B, 7) int64: T, N, G, S, P, K (0 for pairs), padded_tokens.")
      .def_property_readonly("sequences", &Packer::sequences, "(sum of S,) the input sequence of each branch.")
      .def_property_readonly("canonical", &Packer::canonical, "For each input sequence the first equal one.")
      .def("fill", &Packer::fill, py::arg("longs").noconvert(), py::arg("ints").noconvert(), py::arg("threads"),
           "Writes every micro-batch's arrays, one after another; csrc/batches.hpp has their order.");
}
