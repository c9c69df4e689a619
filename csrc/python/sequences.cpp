#include "sequences.hpp"

namespace py = pybind11;

namespace dpofast {
namespace {

// Writes the ints of a list or tuple to `out`. Returns false if an element is no int (a bool is none) or too large.
bool read_ints(PyObject* items, int64_t* out) {
  PyObject** const values = PySequence_Fast_ITEMS(items);
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!PyLong_CheckExact(values[i])) return false;
    int overflow = 0;
    out[i] = PyLong_AsLongLongAndOverflow(values[i], &overflow);
    if (overflow) return false;
  }
  return true;
}

bool is_list(PyObject* object) { return PyList_CheckExact(object) || PyTuple_CheckExact(object); }

}  // namespace

bool Sequences::read_array(py::handle object, Sequence& sequence) {
  if (!py::isinstance<py::array>(object)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) return false;
  sequence.wide = py::isinstance<py::array_t<int64_t>>(object);
  if (!sequence.wide && !py::isinstance<py::array_t<int32_t>>(object)) return false;
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) return false;
  sequence.data = array.data();
  sequence.length = array.size();
  return true;
}

std::shared_ptr<Sequences> Sequences::from_objects(const py::list& objects, const py::function& convert) {
  auto result = std::make_shared<Sequences>();
  const int64_t count = objects.size();
  int64_t room = 0;
  for (const py::handle object : objects) {
    if (is_list(object.ptr())) room += PySequence_Fast_GET_SIZE(object.ptr());
  }
  result->from_lists_.reset(new int64_t[room]);
  int64_t* next = result->from_lists_.get();
  result->items_.resize(count);
  result->alive_.push_back(objects);
  for (int64_t i = 0; i < count; ++i) {
    const py::object object = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(objects.ptr(), i));
    Sequence& item = result->items_[i];
    if (is_list(object.ptr())) {
      const int64_t length = PySequence_Fast_GET_SIZE(object.ptr());
      // convert runs Python code, which may have changed the length of a list.
      if (length <= room && read_ints(object.ptr(), next)) {
        item = {next, length, true};
        next += length;
        room -= length;
        continue;
      }
    } else if (read_array(object, item)) {
      result->alive_.push_back(object);
      continue;
    }
    const py::object array = convert(i);
    if (!read_array(array, item)) throw py::type_error("convert must return a (n,) int64 array");
    result->alive_.push_back(array);
  }
  return result;
}

Sequences::Chunk Sequences::read_chunk(const py::handle& chunk) {
  const auto parts = py::cast<py::tuple>(chunk);
  Chunk read{};
  if (parts.size() != 2 || !read_array(parts[0], read.values) || !read_array(parts[1], read.offsets) ||
      read.offsets.length == 0) {
    throw py::type_error("a chunk is (values, offsets), both (n,) int32 or int64 arrays, with one offset or more");
  }
  alive_.push_back(parts);
  return read;
}

void Sequences::add_chunk(const Chunk& chunk, int64_t column, int64_t columns, int64_t first_row) {
  const auto& [values, offsets] = chunk;
  const char* const data = static_cast<const char*>(values.data);
  const int64_t width = values.wide ? sizeof(int64_t) : sizeof(int32_t);
  int64_t start = offsets[0];
  if (start < 0) throw PackingError(first_row, "offsets start at " + std::to_string(start) + "; expected 0 or more");
  for (int64_t row = 0; row + 1 < offsets.length; ++row) {
    const int64_t stop = offsets[row + 1];
    if (stop < start || stop > values.length) {
      throw PackingError(first_row + row, "offsets go from " + std::to_string(start) + " to " + std::to_string(stop) +
                                              "; expected them to ascend within " + std::to_string(values.length) +
                                              " values");
    }
    items_[(first_row + row) * columns + column] = {data + start * width, stop - start, values.wide};
    start = stop;
  }
}

std::shared_ptr<Sequences> Sequences::from_columns(const py::list& columns) {
  auto result = std::make_shared<Sequences>();
  const int64_t count = columns.size();
  std::vector<std::vector<Chunk>> chunks(count);
  for (int64_t c = 0; c < count; ++c) {
    int64_t rows = 0;
    for (const py::handle chunk : columns[c]) {
      chunks[c].push_back(result->read_chunk(chunk));
      rows += chunks[c].back().rows();
    }
    if (c == 0) result->items_.resize(rows * count);
    if (rows * count != result->size()) throw PackingError(-1, "columns differ in length");
  }
  for (int64_t c = 0; c < count; ++c) {
    int64_t row = 0;
    for (const Chunk& chunk : chunks[c]) {
      result->add_chunk(chunk, c, count, row);
      row += chunk.rows();
    }
  }
  return result;
}

std::shared_ptr<Sequences> Sequences::of_lists(const std::shared_ptr<Sequences>& prompts,
                                               const std::shared_ptr<Sequences>& responses,
                                               const Array<int64_t>& counts) {
  if (counts.size() != prompts->size()) throw PackingError(-1, "counts need one entry for each prompt");
  auto result = std::make_shared<Sequences>();
  result->items_.reserve(prompts->size() + responses->size());
  auto next = responses->items_.begin();
  for (int64_t row = 0; row < prompts->size(); ++row) {
    const int64_t count = counts.data()[row];
    if (count < 0 || count > responses->items_.end() - next) {
      throw PackingError(row, "counts are negative or go beyond the responses");
    }
    result->items_.push_back(prompts->items_[row]);
    result->items_.insert(result->items_.end(), next, next + count);
    next += count;
  }
  if (next != responses->items_.end()) throw PackingError(-1, "responses hold more than the rows own");
  result->alive_ = {py::cast(prompts), py::cast(responses)};
  return result;
}

}  // namespace dpofast
