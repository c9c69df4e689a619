"""Log-probs -> preference losses, and their derivatives with respect to the token log-probs.

- options: LossOptions, the fields that choose a loss, as plain data
- config: PreferenceLoss, the same fields, documented and validated
- divergences: f-divergence scores s(u) of a log-ratio
- pairs: Pairs, what a loss reads of P pairs; StepTotals, sums over the optimizer step
- kinds: one function a loss kind, and the table KINDS
- sequences: Tokens, sums over sequences, pair_logprobs (LD-DPO)
- coefficients: pair_terms, losses and d(sum of losses)/d(token log-prob)
- validate: checks of pairs, reference log-probs and token log-probs
- functional: preference_loss, token_preference_loss and their PreferenceOutput
"""
