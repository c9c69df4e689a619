"""Recurrent layers of hybrid models inside packed rows, by the package tree-recurrence (Axolotl AI, Apache-2.0).

families    families that are registered with it here: Kimi Delta Attention, Falcon-H1, Zamba2, LFM3
follow      hooks on a model's recurrent layers, and the arguments by which a packed forward tells them its segments
"""
