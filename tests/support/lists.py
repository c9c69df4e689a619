"""Lists of responses, their order and their layout in plain Python."""


def ordered(row):
    """(place, rank) of the responses of a row, best first, ranks from 0 without gaps; ties in the order given."""
    keys = row.get("ranks") or [-score for score in row["scores"]]
    distinct = sorted(set(keys))
    return [(k, distinct.index(keys[k])) for k in sorted(range(len(keys)), key=lambda k: keys[k])]


def as_tuples(weights):
    """Weights of responses that can be compared: None where there are none."""
    return [None if one is None else tuple(map(float, one)) for one in weights]


def naive_lists(rows, share):
    """The layout of rows in one micro-batch: (prompt, response, weights) of every sequence, rows, lists, ranks.

    A sequence is a distinct response to a prompt with its weights; a row is a distinct beginning of what may be shared.
    """
    found = {}  # prompt -> its sequences, in order of first appearance
    lists = []
    for row in rows:
        prompt, responses = tuple(row["prompt_ids"]), [tuple(response) for response in row["responses_ids"]]
        weights = as_tuples(row.get("responses_weights") or [None] * len(responses))
        own = found.setdefault(prompt, [])
        members = []
        for place, rank in ordered(row):
            w = weights[place] or (1.0,) * len(responses[place])
            sequence = (prompt, responses[place], w)
            if sequence not in own:
                own.append(sequence)
            members.append((sequence, rank))
        lists.append(members)
    sequences = [sequence for own in found.values() for sequence in own]
    beginnings = set()
    for number, (prompt, response, _) in enumerate(sequences):
        tokens = (*prompt, *response[:-1])
        for length in range(1, len(tokens) + 1):
            shared = share == "prefix" or (share == "prompt" and length <= len(prompt))
            beginnings.add((None if shared else number, None if share == "prefix" else prompt, tokens[:length]))
    numbered = [[(sequences.index(sequence), rank) for sequence, rank in members] for members in lists]
    return sequences, len(beginnings), numbered
