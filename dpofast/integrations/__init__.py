"""Drop-ins for trainers that people already run; each imports its library when it is used.

trl    patch_trl, unpatch_trl, report: trl's DPOTrainer on dpofast's engine
liger  LigerFusedLinearDPOLoss, with liger-kernel's arguments and results
_trl/  what patch_trl puts into trl
"""
