// A loop over independent items on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dpofast {

constexpr int64_t kMaxThreads = 256;

// Calls body(begin, end) for ranges that cover [0, count), on at most `threads` threads including the caller's. body
// must not throw.
template <typename Body>
void parallel_ranges(int64_t count, int64_t threads, Body body) {
  threads = std::min({threads, count, kMaxThreads});
  if (threads <= 1) return body(int64_t{0}, count);
  // More ranges than threads, so that one slow range does not delay the end.
  const int64_t ranges = std::min(count, 8 * threads);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < ranges;) {
      body(r * count / ranges, (r + 1) * count / ranges);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system cannot start more threads; those that run do all the work.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace dpofast
