"""DPOConfig, DPOTrainer and the batch-exact training step."""
