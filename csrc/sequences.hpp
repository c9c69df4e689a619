// Token sequences in the caller's memory, int32 or int64, read in place without a copy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace dpofast {

// Limit on token ids: no tokenizer has more, so a larger value is an error, such as a hash or an overflow.
constexpr int64_t kTokenIds = int64_t{1} << 31;

struct Sequence {
  const void* data;
  int64_t length;
  bool wide;  // int64, else int32

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Starts to load what lies there into the cache. The pairs of a micro-batch lie anywhere in memory: loops over them
// announce what the next loop reads, so that the loads run beside each other and not one after another.
inline void prefetch(const void* address) { __builtin_prefetch(address); }

// Calls body with a pointer to the sequence's tokens of their own type.
template <typename Body>
auto with_tokens(const Sequence& sequence, Body body) {
  return sequence.wide ? body(static_cast<const int64_t*>(sequence.data))
                       : body(static_cast<const int32_t*>(sequence.data));
}

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 32);
}

// Whether all tokens are in [0, limit). The sign bit of `bad` is set by a token that is negative or above limit - 1;
// without a branch, the compiler vectorizes the loop in the tokens' own width.
inline bool in_range(const Sequence& sequence, int64_t limit) {
  return with_tokens(sequence, [&](const auto* tokens) {
    using Token = std::remove_const_t<std::remove_pointer_t<decltype(tokens)>>;
    using Bits = std::make_unsigned_t<Token>;
    const Bits most = static_cast<Bits>(std::min<int64_t>(limit - 1, std::numeric_limits<Token>::max()));
    Bits bad = 0;
    for (int64_t i = 0; i < sequence.length; ++i) {
      const Bits token = static_cast<Bits>(tokens[i]);
      bad |= token | (most - token);
    }
    return static_cast<Token>(bad) >= 0;
  });
}

// Hash of the tokens' values, independent of their type. Four chains of multiplications run in parallel, two tokens per
// multiplication. Equality is always checked afterwards, so ids of 2^32 and more may collide.
inline uint64_t content_hash(const Sequence& sequence) {
  return with_tokens(sequence, [&](const auto* tokens) {
    const auto word = [&](int64_t i) { return static_cast<uint64_t>(static_cast<int64_t>(tokens[i])); };
    uint64_t lanes[4] = {1, 2, 3, 4};
    int64_t i = 0;
    for (; i + 8 <= sequence.length; i += 8) {
      for (int lane = 0; lane < 4; ++lane) {
        const uint64_t both = word(i + 2 * lane) ^ (word(i + 2 * lane + 1) << 32);
        lanes[lane] = (lanes[lane] ^ both) * 0x9E3779B97F4A7C15ull;
      }
    }
    uint64_t hash = sequence.length;
    for (const uint64_t lane : lanes) hash = mix(hash, lane ^ (lane >> 32));
    for (; i < sequence.length; ++i) hash = mix(hash, word(i));
    return hash;
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

// Number of equal tokens, at most `count`, from place a_begin of one sequence and b_begin of another.
inline int64_t common_prefix(const Sequence& a, int64_t a_begin, const Sequence& b, int64_t b_begin, int64_t count) {
  int64_t i = 0;
  if (a.wide == b.wide) {
    with_tokens(a, [&](const auto* tokens) {
      const auto *x = tokens + a_begin, *y = static_cast<decltype(tokens)>(b.data) + b_begin;
      constexpr int64_t kBlock = 16;
      while (i + kBlock <= count && std::memcmp(x + i, y + i, kBlock * sizeof(*x)) == 0) i += kBlock;
    });
  }
  while (i < count && a[a_begin + i] == b[b_begin + i]) ++i;
  return i;
}

// Writes tokens [begin, begin + count) to `out` as int64 and returns the end.
inline int64_t* copy(const Sequence& sequence, int64_t begin, int64_t count, int64_t* out) {
  if (sequence.wide) {
    std::memcpy(out, static_cast<const int64_t*>(sequence.data) + begin, count * sizeof(int64_t));
  } else {
    const int32_t* tokens = static_cast<const int32_t*>(sequence.data) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = tokens[i];
  }
  return out + count;
}

}  // namespace dpofast
