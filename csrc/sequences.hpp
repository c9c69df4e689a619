// Token sequences that lie wherever the caller has them, as int32 or int64: read in place, never gathered first.
#pragma once

#include <cstdint>
#include <cstring>

namespace dpofast {

struct Sequence {
  const void* data;
  int64_t length;
  bool wide;  // int64, else int32

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Calls body with the sequence's tokens under their own type.
template <typename Body>
auto with_tokens(const Sequence& sequence, Body body) {
  return sequence.wide ? body(static_cast<const int64_t*>(sequence.data))
                       : body(static_cast<const int32_t*>(sequence.data));
}

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 32);
}

// A hash of the tokens' values, whatever their type, and whether all of them lie in [0, limit). One pass: four chains
// of multiplications run side by side, and the sign bit of `bad` collects what is negative or above limit - 1.
struct Scan {
  uint64_t hash;
  bool valid;
};

inline Scan scan(const Sequence& sequence, int64_t limit) {
  return with_tokens(sequence, [&](const auto* tokens) {
    const int64_t length = sequence.length;
    const uint64_t most = static_cast<uint64_t>(limit) - 1;
    uint64_t lanes[4] = {1, 2, 3, 4}, bad = 0;
    int64_t i = 0;
    for (; i + 4 <= length; i += 4) {
      for (int lane = 0; lane < 4; ++lane) {
        const uint64_t token = static_cast<uint64_t>(static_cast<int64_t>(tokens[i + lane]));
        bad |= token | (most - token);
        lanes[lane] = (lanes[lane] ^ token) * 0x9E3779B97F4A7C15ull;
        lanes[lane] ^= lanes[lane] >> 32;
      }
    }
    uint64_t hash = length;
    for (const uint64_t lane : lanes) hash = mix(hash, lane);
    for (; i < length; ++i) {
      const uint64_t token = static_cast<uint64_t>(static_cast<int64_t>(tokens[i]));
      bad |= token | (most - token);
      hash = mix(hash, token);
    }
    return Scan{hash, bad >> 63 == 0};
  });
}

inline bool equal(const Sequence& a, const Sequence& b) {
  if (a.length != b.length) return false;
  if (a.wide == b.wide) return std::memcmp(a.data, b.data, a.length * (a.wide ? 8 : 4)) == 0;
  for (int64_t i = 0; i < a.length; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// Appends the first `count` tokens at `out` as int64.
inline int64_t* copy(const Sequence& sequence, int64_t count, int64_t* out) {
  if (sequence.wide) {
    std::memcpy(out, sequence.data, count * sizeof(int64_t));
  } else {
    const int32_t* tokens = static_cast<const int32_t*>(sequence.data);
    for (int64_t i = 0; i < count; ++i) out[i] = tokens[i];
  }
  return out + count;
}

}  // namespace dpofast
