"""Losses as a user writes them, at the top level of a module that other processes can import."""

import torch
from torch.nn.functional import logsigmoid

from dpofast import preference_kind


def dpo_by_hand(pairs, loss):
    """DPO as one would write it, without a declaration."""
    return -logsigmoid(pairs.beta * (pairs.chosen - pairs.rejected))


def other_by_hand(pairs, loss):
    """Another function of the same module."""
    return torch.relu(1 - pairs.beta * (pairs.chosen - pairs.rejected))


@preference_kind(margin=True, divergence=True, smoothing="[0, 0.5]")
def sigmoid_by_hand(pairs, loss):
    """The kind sigmoid with all that it takes."""
    margin, flipped = pairs.margin(loss), pairs.label_smoothing
    return -(1 - flipped) * logsigmoid(margin) - flipped * logsigmoid(-margin)


@preference_kind(reference=False, lengths=True, options=["simpo_gamma"])
def simpo_by_hand(pairs, loss):
    """The kind simpo."""
    difference = pairs.policy_chosen / pairs.chosen_tokens - pairs.policy_rejected / pairs.rejected_tokens
    return -logsigmoid(pairs.beta * difference - loss.simpo_gamma)


@preference_kind(reference=False, lengths=True)
def sft_by_hand(pairs, loss):
    """The kind sft."""
    return -pairs.chosen_sum * pairs.nll_scale


@preference_kind(coupled=True)
def kto_by_hand(pairs, loss):
    """The kind kto_pair."""
    divergence = ((pairs.chosen + pairs.rejected).mean() / 2).clamp(min=0).detach()
    chosen = (-pairs.beta * (pairs.chosen - divergence)).sigmoid()
    return chosen + (-pairs.beta * (divergence - pairs.rejected)).sigmoid()


@preference_kind(lists=True)
def infonca_by_hand(lists, loss):
    """The kind infonca of scores, or of the best response alone."""
    rewards = lists.rewards
    others = lists.member[:, None, :] & ~torch.eye(rewards.shape[1], dtype=torch.bool)
    logs = logsigmoid(rewards - torch.where(others, rewards[:, None, :], -torch.inf).logsumexp(2))
    if lists.scores is None:
        return -logs[:, 0]
    targets = torch.where(lists.member, lists.scores, -torch.inf).softmax(1)
    return -(targets * torch.where(lists.member, logs, 0.0)).sum(1)


@preference_kind(lists=True, scores=True)
def gap_by_hand(lists, loss):
    """The first two responses' reward margin against their gap of scores, which there must be."""
    gap = lists.scores[:, 0] - lists.scores[:, 1]
    return -logsigmoid(lists.rewards[:, 0] - lists.rewards[:, 1] - gap)


not_a_function = 3
