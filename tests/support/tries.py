"""A packed batch from first principles: a trie of the pairs' sequences in plain Python."""

import torch


def unpadded(batch):
    """(prompt, response) of every sequence, read from the padded form."""
    ids, attention, completion = batch.padded(pad_id=-1)
    assert ids.shape == attention.shape == completion.shape and ids.dtype == torch.int64
    assert torch.equal(ids == -1, attention == 0)
    return [
        (tuple(row[(mask - done).bool()].tolist()), tuple(row[done.bool()].tolist()))
        for row, mask, done in zip(ids, attention, completion, strict=True)
    ]


class Rows:
    """A trie of tokens in plain Python: a node is (token, position, children), a child is found by its key."""

    def __init__(self):
        self.roots = {}

    def add(self, keys, tokens):
        """Goes along a path, and makes what is not there; the nodes of the path."""
        children, path = self.roots, []
        for position, (key, token) in enumerate(zip(keys, tokens, strict=True)):
            path.append(children.setdefault(key, (token, position, {})))
            children = path[-1][2]
        return path

    def lay_out(self):
        """(node, rows of its path) of every node, depth first."""
        found, waiting = [], [(node, []) for node in reversed(self.roots.values())]
        while waiting:
            node, path = waiting.pop()
            path = [*path, len(found)]
            found.append((node, path))
            waiting += [(child, path) for child in reversed(node[2].values())]
        return found


def naive_pack(pairs, share):
    """The layout from first principles: tokens, positions, logit rows, targets, sequences, the rows that a row sees."""
    responses = {}  # prompt -> branches, both in order of first appearance
    for _, prompt, chosen, rejected in pairs:
        for response in (chosen, rejected):
            branches = responses.setdefault(prompt, [])
            if response not in branches:
                branches.append(response)
    sequences = [(prompt, response) for prompt, branches in responses.items() for response in branches]
    rows, paths = Rows(), []
    for number, (prompt, response) in enumerate(sequences):
        tokens = [*prompt, *response[:-1]]
        apart = {"none": [number] * len(tokens), "prompt": [prompt] * len(prompt) + [number] * (len(response) - 1)}
        keys = list(zip(apart.get(share, [0] * len(tokens)), tokens, strict=True))
        paths.append(rows.add(keys, tokens))
    laid_out = rows.lay_out()
    row_of = {id(node): path[-1] for node, path in laid_out}
    logit_rows = [
        row_of[id(node)] for path, (prompt, _) in zip(paths, sequences, strict=True) for node in path[len(prompt) - 1 :]
    ]
    tokens, positions = ([node[part] for node, _ in laid_out] for part in (0, 1))
    targets = [token for _, response in sequences for token in response]
    return tokens, positions, logit_rows, targets, sequences, [path for _, path in laid_out]


def rows_of_pair(prompt, chosen, rejected, share):
    return len(naive_pack([(0, prompt, chosen, rejected)], share)[0])
