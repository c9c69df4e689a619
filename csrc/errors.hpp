// The packer's exception for invalid input, and the size limits common to all its parts.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace dpofast {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
// Positions, targets and segment bounds are int32 on the device.
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// Invalid input. `example` is the row it was found in, or -1 if no single row is responsible.
class PackingError : public std::invalid_argument {
 public:
  PackingError(int64_t example, const std::string& what)
      : std::invalid_argument(example < 0 ? what : "examples[" + std::to_string(example) + "]: " + what),
        example(example) {}
  const int64_t example;
};

// Throws PackingError for an argument below 1.
inline void check_at_least_one(const char* name, int64_t value) {
  if (value < 1) throw PackingError(-1, std::string(name) + ": expected 1 or more, got " + std::to_string(value));
}

// Throws PackingError for a micro-batch whose positions or targets exceed int32.
inline void check_positions(int64_t tokens, int64_t targets) {
  if (tokens <= kMaxPositions && targets <= kMaxPositions) return;
  throw PackingError(-1, "a micro-batch would hold " + std::to_string(tokens) + " tokens and " +
                             std::to_string(targets) + " targets; int32 positions allow " +
                             std::to_string(kMaxPositions) +
                             ": give a smaller max_tokens, or shorten the longest pair");
}

}  // namespace dpofast
