"""The packed forward inside models of transformers.

attach      attach_logprob_head: model(packed=batch) returns log-probs, or the whole preference loss
parts       the language model of a composite model, a model without its head
wrappers    what other libraries put over a model's forward: taken off, kept, or refused
load        load models and adapters whole
lm_head     LogprobLinear, the class of an attached model's LM head, and what model families do to their logits
forward     runs the backbone: hidden states of a packed batch, over its packed row or over padded rows
rope        rotary tables that depend on a sequence's length (LongRoPE, dynamic NTK)
neftune     NEFTune's noise on the input embeddings in training
dropout     dropout of a model turned off
moe         the load-balancing loss of mixtures of experts over packed rows
lora        fuse_lora: PEFT's LoRA layers with fewer passes over memory
adapters    PEFT: what is refused, what wrapping does to a model, what is trained outside of an adapter
vision/     images in prompts of composite models
recurrent/  recurrent layers of hybrid models that follow the branches of a packed row
checks/     which models can run so: rules, and a comparison with the model's own logits
attention/  attention of a packed row: each position sees the sequence that it continues
"""
