"""Examples -> packed batches: the Python side of the C++ packer and planner."""
