"""Drop-in replacements for trl and liger-kernel; each imports its library on first use.

trl    patch_trl, unpatch_trl, report: trl's DPOTrainer on dpofast's engine
liger  LigerFusedLinearDPOLoss, with liger-kernel's arguments and results
_trl/  the replacements that patch_trl installs
"""
