"""What each packed row sees, by definition: the rows of its segment's ancestors and the earlier ones of its own."""


def histories(segments):
    """For every row its path, in order of position; the row itself is the last."""
    bounds, parents, seen = segments.cu_seqlens_q.tolist(), segments.parents.tolist(), []
    for segment, parent in enumerate(parents):
        path = [] if parent < 0 else seen[bounds[parent + 1] - 1]
        for row in range(bounds[segment], bounds[segment + 1]):
            path = [*path, row]
            seen.append(path)
    return seen
