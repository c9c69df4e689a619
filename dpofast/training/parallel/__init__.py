"""Several devices: sizes of the groups that share a model, FSDP2 and DeepSpeed."""
