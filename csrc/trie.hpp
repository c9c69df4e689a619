// The sequences of one micro-batch as a trie, whose rows lie depth first. Pure C++17, no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "groups.hpp"
#include "index_map.hpp"

namespace dpofast {

// Consecutive rows of one path, whose tokens are consecutive tokens of one input sequence (a prompt or a response).
struct Piece {
  int64_t sequence, begin, length;  // tokens [begin, begin + length) of Examples::sequences[sequence]
  int64_t position, row;            // of its first token: its place in a sequence, and in the micro-batch
  int32_t parent;                   // the piece that it follows, which stands before it, or -1
  int32_t segment;                  // pieces without a fork between them are one segment
};

struct Trie {
  std::vector<Piece> pieces;     // in the order of their rows
  std::vector<int32_t> ends;     // (S,) the piece with each sequence's last row
  std::vector<int32_t> parents;  // (G,) the segment that each segment follows, or -1

  int64_t rows() const { return pieces.empty() ? 0 : pieces.back().row + pieces.back().length; }
};

// Builds tries one after another, and reuses its memory.
class TrieBuilder {
 public:
  explicit TrieBuilder(const Groups& groups) : groups_(groups) {}

  // The trie of `count` branches (indices into groups.branches), those of one group next to each other. Sequences share
  // what groups.share allows. Children of a piece and roots stand in the order of the first branch that reaches them.
  // A branch's last token is only a target and has no row.
  Trie build(const int64_t* branches, int64_t count);

 private:
  struct Node {
    int64_t sequence, begin, length, position;
    int32_t parent, owner;              // owner: the first branch that reaches it
    int32_t first_child, next_sibling;  // set when all branches are in
  };
  // The first `used` rows of a node; node -1 is the place before every root.
  struct Place {
    int32_t node;
    int64_t used;
  };

  Place extend(Place at, int64_t sequence, int64_t first, int64_t end, int32_t owner);
  Place split(Place at);
  Place within(int32_t node, int64_t rows) const;
  int32_t add(const Node& node);
  int32_t& child(int32_t parent, int64_t token);
  void link_children(int64_t count);
  Trie lay_out() const;

  const Groups& groups_;
  std::vector<Node> nodes_;
  std::vector<int32_t> ends_, roots_;
  IndexMap children_;  // (parent, first token) -> node
};

}  // namespace dpofast
