"""Examples -> packed micro-batches: the Python side of the C++ packer and planner (csrc/).

- pack: pack and PackBuffers
- batch: PackedBatch and its Segments, with the layout of a packed row
- examples: reading mappings, columns, Arrow tables and Datasets for the packer
- sources: one optional column of any of them as numbers
- columns: the order of lists, weights and other numbers of rows and tokens, checked and gathered for a micro-batch
- planner: plan, which items share a micro-batch and which micro-batches a rank
- collator: PackingCollator, group_by_prompt and PromptGroupSampler for a DataLoader
- arguments: checks of integer arguments
"""
