// dpofast._C: the packer for Python. Numpy arrays in and out; the GIL is released while planning and filling.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "packing.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
dpofast::Span<T> span(const Array<T>& array) {
  return {array.data(), static_cast<int64_t>(array.size())};
}

// Hands the vector's memory to numpy without a copy.
template <typename T>
py::array to_numpy(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule release(owner, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(std::move(shape), owner->data(), release);
}

template <typename T>
py::array to_numpy(std::vector<T>&& values) {
  const auto size = static_cast<py::ssize_t>(values.size());
  return to_numpy(std::move(values), {size});
}

template <typename T>
py::array to_numpy_rows(std::vector<T>&& values, py::ssize_t columns) {
  const auto rows = static_cast<py::ssize_t>(values.size()) / columns;
  return to_numpy(std::move(values), {rows, columns});
}

py::tuple plan(const Array<int64_t>& lengths, int64_t max_tokens) {
  const auto sizes = span(lengths);
  dpofast::Bins bins;
  {
    py::gil_scoped_release nogil;
    bins = dpofast::plan_items({sizes.data, sizes.data + sizes.size}, max_tokens);
  }
  return py::make_tuple(to_numpy(std::move(bins.bin_of)), to_numpy(std::move(bins.loads)));
}

py::tuple pack(const Array<int64_t>& tokens, const Array<int64_t>& lengths, const Array<int64_t>& branch_counts,
               const Array<int64_t>& pair_counts, const Array<int64_t>& pairs, const Array<uint8_t>& grouped,
               int64_t max_tokens, bool share_prompts, int64_t vocab_size) {
  const dpofast::Examples examples{span(tokens),      span(lengths), span(branch_counts),
                                   span(pair_counts), span(pairs),   span(grouped)};
  dpofast::Groups groups;
  std::vector<dpofast::Batch> batches;
  {
    py::gil_scoped_release nogil;
    groups = dpofast::group_examples(examples, share_prompts, vocab_size);
    batches = dpofast::fill_batches(groups, dpofast::plan_batches(groups, max_tokens));
  }
  py::list result;
  for (auto& batch : batches) {
    py::dict arrays;
    arrays["input_ids"] = to_numpy(std::move(batch.input_ids));
    arrays["position_ids"] = to_numpy(std::move(batch.position_ids));
    arrays["logit_rows"] = to_numpy(std::move(batch.logit_rows));
    arrays["targets"] = to_numpy(std::move(batch.targets));
    arrays["cu_seqlens_q"] = to_numpy(std::move(batch.cu_seqlens_q));
    arrays["prefixes"] = to_numpy_rows(std::move(batch.prefixes), 2);
    arrays["cu_targets"] = to_numpy(std::move(batch.cu_targets));
    arrays["pairs"] = to_numpy_rows(std::move(batch.pairs), 2);
    arrays["pair_examples"] = to_numpy(std::move(batch.pair_examples));
    arrays["sequences"] = to_numpy(std::move(batch.sequences));
    arrays["padded_tokens"] = batch.padded_tokens;
    result.append(std::move(arrays));
  }
  return py::make_tuple(result, to_numpy(std::move(groups.canonical)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "dpofast's packer; use dpofast.packing. Bad input raises ValueError.";
  module.attr("UNLIMITED") = dpofast::kUnlimited;
  module.def("plan", &plan, py::arg("lengths").noconvert(), py::arg("max_tokens"),
             "lengths (n,) int64 -> the bin of each item (n,) int64, the load of each bin (m,) int64, descending.");
  module.def(
      "pack", &pack, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(),
      py::arg("branch_counts").noconvert(), py::arg("pair_counts").noconvert(), py::arg("pairs").noconvert(),
      py::arg("grouped").noconvert(), py::arg("max_tokens"), py::arg("share_prompts"), py::arg("vocab_size"),
      "Flat examples (int64; grouped uint8) -> a dict of arrays for each micro-batch, and for each input sequence "
      "the first equal one.");
}
