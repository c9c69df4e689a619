#include <algorithm>

#include "bins.hpp"
#include "rooms.hpp"

namespace dpofast {
namespace {

// Number of item pairs that are tried to fill the rest of a bin. With dense sizes, one of the first few fits exactly.
constexpr int kTriedPairs = 16;

// The items not yet packed, as stacks by size, in a room index keyed by `longest - size`: its next larger key is the
// next smaller size.
class Left {
 public:
  Left(const std::vector<int64_t>& sizes, int64_t longest) : longest_(longest), stacks_(longest) {
    for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) stacks_.push(longest - sizes[i], i);
  }
  // The largest remaining size of at most `size`, or -1.
  int64_t at_most(int64_t size) const {
    const int64_t place = size < 0 ? -1 : stacks_.find(std::max<int64_t>(longest_ - size, 0));
    return place < 0 ? -1 : longest_ - place;
  }
  bool has(int64_t size, int64_t other) const {
    if (size > longest_ || stacks_.top(longest_ - size) < 0) return false;
    return size != other || stacks_.below(stacks_.top(longest_ - size)) >= 0;
  }
  int64_t take(int64_t size) {
    const int64_t item = stacks_.top(longest_ - size);
    stacks_.remove(longest_ - size, -1);
    return item;
  }

 private:
  int64_t longest_;
  BitRooms stacks_;
};

}  // namespace

Bins close_exactly(const std::vector<int64_t>& sizes, int64_t capacity) {
  const int64_t count = sizes.size(), shortest = sizes[count - 1];
  Left left(sizes, sizes[0]);
  Bins bins{std::vector<int64_t>(count), {}};
  for (int64_t taken = 0; taken < count;) {
    int64_t room = capacity;
    const auto take = [&](int64_t size) {
      bins.bin_of[left.take(size)] = bins.loads.size();
      room -= size;
      ++taken;
    };
    while (room >= shortest) {
      const int64_t size = left.at_most(room);
      if (size < 0) break;
      if (size < room && room <= 2 * size) {
        // Another single item would leave room that few items fit. Two items of about half the room can fill it
        // exactly.
        int tried = 0;
        for (int64_t half = left.at_most(room / 2); half >= 0 && room - half <= size && tried < kTriedPairs; ++tried) {
          if (left.has(room - half, half)) {
            take(room - half);
            take(half);
            break;
          }
          half = left.at_most(half - 1);
        }
        if (room == 0) break;
      }
      take(size);
    }
    bins.loads.push_back(capacity - room);
  }
  return bins;
}

}  // namespace dpofast
