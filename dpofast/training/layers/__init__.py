"""What a run's decoder layers run as: compiled, Liger's fused kernels, or as they are.

choose     decides, and says so
compiled   torch.compile, layer by layer
liger      Liger's layers without its loss
"""
