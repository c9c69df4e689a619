"""What patch_trl() puts into trl.

seams     where trl can be entered, version by version, and the replacing of names there
forward   a model's forward with fused_lm_head=True
scores    log-probs and statistics of labels, packed or padded
rows      trl's padded rows -> a packed batch, and the way back
logits    ScoredLogits: what trl before 1.15 gets in place of logits
collator  trl's collator, which also reads the rows on the CPU
"""
