"""Every kind and modifier of dpofast.losses, and token-level problems for them, shared by the tests of the losses."""

import torch

from dpofast import reference
from dpofast.losses.kinds import KINDS
from dpofast.losses.sequences import pair_logprobs

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def plain_options(kind):
    """Return the options that a kind requires, with values of its own options that differ from the defaults."""
    own = {
        "exo_pair": {"label_smoothing": 0.1},
        "robust": {"label_smoothing": 0.1},
        "sigmoid": {"label_smoothing": 0.1},
        "sigmoid_norm": {"label_smoothing": 0.1},
        "aot": {"label_smoothing": 0.1},
        "aot_unpaired": {"label_smoothing": 0.1},
        "discopop": {"discopop_tau": 0.3},
        "simpo": {"simpo_gamma": 0.7},
        "cpo": {"cpo_alpha": 0.6},
        "alpha_po": {"alpha_po_alpha": 0.4, "simpo_gamma": 0.7},
        "dpop": {"dpop_lambda": 3.0},
        "beta_dpo": {"beta_dpo_alpha": 0.3, "beta_dpo_threshold": 0.2},
        "infonca": {"score_temperature": 0.5},
        "nca": {"score_temperature": 0.5},
        "lipo_lambda": {"score_temperature": 0.5},
    }
    return {"kind": kind, "beta": 0.3, **own.get(kind, {})}


def every_loss():
    """Return options of PreferenceLoss by name: each kind alone, each with every modifier it takes, and mixes."""
    cases = {}
    for name, kind in KINDS.items():
        plain = plain_options(name)
        cases[name] = plain
        if kind.divergence:
            for divergence in DIVERGENCES[1:]:
                cases[f"{name} {divergence}"] = {**plain, "f_divergence_type": divergence}
        if name != "sft" and not kind.lists:
            cases[f"{name} ld"] = {**plain, "ld_alpha": 0.3}
        if not name.startswith("aot") and not kind.lists:
            cases[f"{name} weighted"] = {**plain, "use_weighting": True}
        if not kind.nll:
            cases[f"{name} rpo"] = {**plain, "rpo_alpha": 0.4}
    cases["sigmoid ε=0"] = {"kind": "sigmoid", "beta": 0.3}
    cases["alpha 1"] = {"kind": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}
    cases["ipo summed"] = {**plain_options("ipo"), "ipo_average": False}
    cases["bco running mean"] = {**plain_options("bco_pair"), "bco_delta": "running_mean"}
    cases["alpha_po, a negative alpha"] = {**plain_options("alpha_po"), "alpha_po_alpha": -0.5}
    cases["mpo"] = {"kind": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0], "beta": 0.3}
    cases["pairs and lists"] = {"kind": ("sigmoid", "plackett_luce", "nca"), "weights": (0.5, 1.0, 2.0), "beta": 0.3}
    cases["mix of all modifiers"] = {
        "kind": ("sigmoid", "ipo", "sft"),
        "weights": (1.0, 0.5, 0.1),
        "beta": 0.3,
        "f_divergence_type": "js_divergence",
        "ld_alpha": 0.2,
        "use_weighting": True,
    }
    return cases


LOSSES = every_loss()

# Branches shared by several pairs, an only pair, a sequence in no pair; lengths differ on both sides.
LENGTHS = [5, 3, 1, 7, 2, 4, 2, 6]
PAIRS = [[0, 1], [0, 2], [1, 2], [3, 4], [6, 7]]


def problem(dtype=torch.float64, lengths=LENGTHS, pairs=PAIRS, seed=0):
    """token_logps, cu_targets, pairs, the reference's token log-probs and log Σp² of some sequences."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(sum(lengths), generator=generator, dtype=torch.float64).add(0.01).log().to(dtype)

    cu_targets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return draw(), cu_targets, torch.tensor(pairs, dtype=torch.int32), draw(), draw()


def reference_sums(ref_tokens, cu_targets, pairs, loss):
    """Return the ref_logps argument of the loss functions: (S,), with ld_alpha (P, 2), or None."""
    if not loss.needs_reference:
        return None
    if loss.ld_alpha is None:
        return reference.sequence_logprobs(ref_tokens, cu_targets)
    return pair_logprobs(ref_tokens, cu_targets, pairs, ld_alpha=loss.ld_alpha)
