"""The replacements that patch_trl() installs in trl.

seams     which names are replaced in each version of trl
forward   a model's forward with fused_lm_head=True
scores    log-probs and statistics of labels, packed or padded
rows      trl's padded rows -> a packed batch, and the way back
images    images of the padded rows: which of the model's arguments they are, and which row has which
logits    ScoredLogits, which trl before 1.15 gets in place of logits
collator  trl's collators, which also read the rows and their images on the CPU
"""
