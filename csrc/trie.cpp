#include "trie.hpp"

#include <algorithm>

namespace dpofast {

Trie TrieBuilder::build(const int64_t* branches, int64_t count) {
  nodes_.clear();
  ends_.clear();
  if (groups_.share == Share::kPrefix) {
    children_.reset(4 * count);  // a branch adds at most three nodes
  }
  int64_t open_group = -1, prompt_rows = 0;
  int32_t prompt_end = -1;  // a node that the prompt's last row was in; splits may have moved the row up since
  for (int32_t owner = 0; owner < count; ++owner) {
    const Branch& branch = groups_.branches[branches[owner]];
    if (branch.group != open_group || groups_.share == Share::kNone) {
      open_group = branch.group;
      const Prompt& prompt = groups_.prompts[branch.group];
      prompt_rows = prompt.length;
      prompt_end = extend({-1, 0}, prompt.sequence, prompt.first, prompt_rows, owner).node;
    }
    const Place start = within(prompt_end, prompt_rows);
    ends_.push_back(extend(start, branch.sequence, branch.first, branch.length - 1, owner).node);
  }
  // What was split after a branch was in may have moved its last row up.
  for (int32_t owner = 0; owner < count; ++owner) {
    const Branch& branch = groups_.branches[branches[owner]];
    const int64_t rows = groups_.prompts[branch.group].length + branch.length - 1;
    ends_[owner] = within(ends_[owner], rows).node;
  }
  link_children(count);
  return lay_out();
}

// The place after the first `rows` rows of the path that runs through `node`, which has that many rows or more.
TrieBuilder::Place TrieBuilder::within(int32_t node, int64_t rows) const {
  while (nodes_[node].position >= rows) node = nodes_[node].parent;
  return {node, rows - nodes_[node].position};
}

// Goes on from a place by the first `end` tokens of a sequence, of which `first` is the first: over rows that are there
// already as far as sequences may share them, then over new ones.
TrieBuilder::Place TrieBuilder::extend(Place at, int64_t sequence, int64_t first, int64_t end, int32_t owner) {
  const auto& sequences = groups_.examples.sequences;
  const Sequence& tokens = sequences[sequence];
  int64_t begin = 0;
  const auto token = [&] { return begin == 0 ? first : tokens[begin]; };
  while (groups_.share == Share::kPrefix && begin < end) {
    if (at.node < 0 || at.used == nodes_[at.node].length) {
      const int32_t next = child(at.node, token());
      if (next < 0) break;
      at = {next, 0};
    }
    const Node& node = nodes_[at.node];
    const int64_t same = common_prefix(sequences[node.sequence], node.begin + at.used, tokens, begin,
                                       std::min(node.length - at.used, end - begin));
    at.used += same;
    begin += same;
    if (at.used < node.length) break;
  }
  if (begin == end) return at;
  if (at.node >= 0 && at.used < nodes_[at.node].length) at = split(at);
  const int64_t position = at.node < 0 ? 0 : nodes_[at.node].position + nodes_[at.node].length;
  const int32_t added = add({sequence, begin, end - begin, position, at.node, owner, -1, -1});
  if (groups_.share == Share::kPrefix) child(at.node, token()) = added;
  return {added, end - begin};
}

// Cuts a node, and returns the place at the end of its upper part, a new node. The lower part keeps the children.
TrieBuilder::Place TrieBuilder::split(Place at) {
  Node upper = nodes_[at.node];
  upper.length = at.used;
  const int32_t added = add(upper);
  Node& lower = nodes_[at.node];
  lower.begin += at.used;
  lower.length -= at.used;
  lower.position += at.used;
  lower.parent = added;
  const Sequence& tokens = groups_.examples.sequences[lower.sequence];
  child(upper.parent, tokens[upper.begin]) = added;
  child(added, tokens[lower.begin]) = at.node;
  return {added, at.used};
}

int32_t TrieBuilder::add(const Node& node) {
  nodes_.push_back(node);
  return static_cast<int32_t>(nodes_.size() - 1);
}

// The child of a node (-1: a root) that begins with a token, to read or to set; -1 if it has none.
int32_t& TrieBuilder::child(int32_t parent, int64_t token) {
  return children_[(static_cast<uint64_t>(parent + 1) << 32) | static_cast<uint64_t>(token)];
}

// Links the roots and every node's children, in the order of their owners. No two of them have the same owner.
void TrieBuilder::link_children(int64_t count) {
  std::vector<int32_t> last(count, -1), previous(nodes_.size(), -1);
  for (size_t n = 0; n < nodes_.size(); ++n) {
    previous[n] = last[nodes_[n].owner];
    last[nodes_[n].owner] = static_cast<int32_t>(n);
  }
  int32_t first_root = -1;
  for (int64_t owner = count - 1; owner >= 0; --owner) {
    for (int32_t n = last[owner]; n >= 0; n = previous[n]) {
      int32_t& first = nodes_[n].parent < 0 ? first_root : nodes_[nodes_[n].parent].first_child;
      nodes_[n].next_sibling = first;
      first = n;
    }
  }
  roots_.assign(first_root >= 0, first_root);
}

Trie TrieBuilder::lay_out() const {
  Trie trie;
  trie.pieces.reserve(nodes_.size());
  std::vector<int32_t> waiting = roots_, place(nodes_.size());
  int64_t row = 0;
  while (!waiting.empty()) {
    const int32_t n = waiting.back();
    waiting.pop_back();
    const Node& node = nodes_[n];
    const int32_t parent = node.parent < 0 ? -1 : place[node.parent];
    const int32_t above = parent < 0 ? -1 : trie.pieces[parent].segment;
    int32_t segment = above;
    if (parent < 0 || nodes_[nodes_[node.parent].first_child].next_sibling >= 0) {  // after a fork, or a root
      segment = static_cast<int32_t>(trie.parents.size());
      trie.parents.push_back(above);
    }
    place[n] = static_cast<int32_t>(trie.pieces.size());
    trie.pieces.push_back({node.sequence, node.begin, node.length, node.position, row, parent, segment});
    row += node.length;
    if (node.next_sibling >= 0) waiting.push_back(node.next_sibling);
    if (node.first_child >= 0) waiting.push_back(node.first_child);
  }
  trie.ends.reserve(ends_.size());
  for (const int32_t n : ends_) trie.ends.push_back(place[n]);
  return trie;
}

}  // namespace dpofast
