"""Log-probs -> preference losses and their derivatives."""
