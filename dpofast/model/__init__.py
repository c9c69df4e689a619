"""The packed forward inside models of transformers.

attach      attach_logprob_head: model(packed=batch) returns log-probs, or the whole preference loss
lm_head     LogprobLinear, the class of an attached model's LM head, and what model families do to their logits
forward     runs the backbone: hidden states of a packed batch, over its packed row or over padded rows
support     which models can run so; the parity check against the model's own logits
moe         the load-balancing loss of mixtures of experts over packed rows
lora        fuse_lora: PEFT's LoRA layers with fewer passes over memory
adapters    PEFT: what is refused, what wrapping does to a model, what is trained outside of an adapter
attention/  attention of a packed row: each response sees its prompt and itself
"""
