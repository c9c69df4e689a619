"""Whether a model computes the right log-probs here.

- support: rules on its class and config
- images: whether a composite model may see images
- parity: its log-probs against those of its own logits, in eval and in train mode
"""
