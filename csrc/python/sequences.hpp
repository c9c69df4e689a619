// Token ids of Python objects (lists, numpy arrays, buffers of Arrow list columns) as Sequences; only lists are copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "../groups.hpp"

namespace dpofast {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

class Sequences {
 public:
  static std::shared_ptr<Sequences> from_objects(const pybind11::list& objects, const pybind11::function& convert);
  static std::shared_ptr<Sequences> from_columns(const pybind11::list& columns);
  static std::shared_ptr<Sequences> of_lists(const std::shared_ptr<Sequences>& prompts,
                                             const std::shared_ptr<Sequences>& responses, const Array<int64_t>& counts);

  int64_t size() const { return items_.size(); }
  Span<Sequence> span() const { return {items_.data(), size()}; }
  std::vector<int64_t> lengths() const {
    std::vector<int64_t> lengths;
    for (const Sequence& item : items_) lengths.push_back(item.length);
    return lengths;
  }

 private:
  // Rows of one column: row r is values[offsets[r]:offsets[r + 1]].
  struct Chunk {
    Sequence values, offsets;
    int64_t rows() const { return offsets.length - 1; }
  };

  // Returns whether `object` is a one-dimensional, contiguous array of int32 or int64, and if so points the sequence
  // to it.
  static bool read_array(pybind11::handle object, Sequence& sequence);
  Chunk read_chunk(const pybind11::handle& chunk);
  void add_chunk(const Chunk& chunk, int64_t column, int64_t columns, int64_t first_row);

  std::vector<Sequence> items_;
  std::unique_ptr<int64_t[]> from_lists_;
  std::vector<pybind11::object> alive_;
};

}  // namespace dpofast
