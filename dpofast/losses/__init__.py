"""Log-probs -> preference losses, and their derivatives with respect to the token log-probs.

- options: LossOptions, the fields that choose a loss, as plain data
- config: PreferenceLoss, the same fields, documented and validated
- divergences: f-divergence scores s(u) of a log-ratio
- pairs: Pairs and Lists, what a loss reads of P rows; StepTotals, sums over the optimizer step
- columns: PreferenceColumns, what data say of rows beside their responses
- kinds, list_kinds: one function a loss kind of pairs or of lists, and the table KINDS
- own_kinds: functions of users as kinds: preference_kind, kind_of, and the trial that admits them
- sequences: Tokens, sums over sequences, pair_logprobs (LD-DPO)
- coefficients: pair_terms, losses and d(sum of losses)/d(token log-prob)
- validate: checks of pairs, reference log-probs and token log-probs
- functional: preference_loss, token_preference_loss and their PreferenceOutput
"""
