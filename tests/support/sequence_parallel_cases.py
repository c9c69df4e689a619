"""A model on a batch whose rows are split over ranks: cases, and rank_main(), which runs them on every rank."""

import pytest
import torch

from dpofast import PackedPreference, PreferenceLoss, attach_logprob_head, pack
from dpofast.model.checks.split import check_split
from tests.support.families import family_model
from tests.support.rank_processes import become_rank
from tests.support.tiny import tiny_dialogues, tiny_pairs
from tests.support.tiny_lists import tiny_columns, tiny_lists

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
_MULTI_HEAD = {"num_key_value_heads": 4}


def short_pair():
    """One pair whose responses are short, so that of four ranks some have no target."""
    return [{"prompt_ids": [5, 6, 7, 8, 9, 10], "chosen_ids": [11], "rejected_ids": [12, 13]}]


def shared_prompts():
    """Pairs, two of each prompt."""
    rows = tiny_pairs(8)
    for before, row in zip(rows[::2], rows[1::2], strict=True):
        row["prompt_ids"] = before["prompt_ids"]
    return rows


def lists():
    """Lists of two to five responses."""
    return tiny_lists(6)


def columns():
    """Pairs with every optional column."""
    return tiny_columns(8, 0, "weight", "margin", "beta", "label_smoothing", "token_weights")


# name: family, options of the model, rows, loss (None: log-probs with statistics), reentrant checkpointing or None
CASES = {
    "grouped heads": {"family": "llama"},
    "one K/V head": {"family": "llama", "extra": {"num_key_value_heads": 1}},
    "as many K/V heads": {"family": "llama", "extra": _MULTI_HEAD},
    "sliding window": {"family": "mistral"},
    "softcap": {"family": "gemma2"},
    "sinks": {"family": "gpt-oss"},
    "norms of heads": {"family": "qwen3"},
    "experts": {"family": "mixtral"},
    "values of another width": {"family": "deepseek-v3"},
    "chunks and scaled queries": {"family": "llama4"},
    "attention methods": {"family": "gpt-neo"},
    "numbers its rows itself": {"family": "bart"},
    "shared prompts": {"rows": shared_prompts},
    "few targets": {"rows": short_pair},
    "not reentrant": {"checkpointing": False},
    "reentrant": {"checkpointing": True},
    "frozen but for the last layer": {"frozen": True},
    "sigmoid": {"loss": PreferenceLoss()},
    "rpo": {"loss": PreferenceLoss(rpo_alpha=1.0)},
    "weighted": {"loss": PreferenceLoss(use_weighting=True)},
    "aot": {"loss": PreferenceLoss(kind="aot")},
    "lists": {"rows": lists, "loss": PreferenceLoss(kind="plackett_luce")},
    "columns": {"rows": columns, "loss": PreferenceLoss()},
    "a pair of few targets": {"rows": short_pair, "loss": PreferenceLoss(), "checkpointing": True},
}
# What two ranks run in the default suite.
FEW = (
    *("grouped heads", "one K/V head", "sliding window", "sinks", "chunks and scaled queries", "attention methods"),
    *("few targets", "not reentrant", "reentrant", "weighted", "lists", "columns"),
)


def run(group=None, *, family="llama", extra=None, rows=tiny_dialogues, loss=None, checkpointing=None, frozen=False):
    """The values that a model computes for rows, by name, and the gradients of its weights by "grad NAME".

    Args:
        group: what the rows are split over, or None.
        family: of tests/support/families.py.
        extra: options of its config.
        rows: makes the rows.
        loss: a preference loss; None for log-probs and statistics, and a loss that weights each token otherwise.
        checkpointing: whether gradient checkpointing is reentrant; None for none.
        frozen: whether all weights but those of the last layer and the head are.
    """
    model = attach_logprob_head(family_model(family, **(extra or {}))).train()
    if frozen:
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    (batch,) = pack(list(rows()))
    batch = batch if group is None else batch.split_over(group)
    if loss is None:
        output = model(packed=batch, stats=STATS)
        values = {name: getattr(output, name) for name in ("logps", *STATS)}
        total = (output.logps * torch.linspace(-1, 1, batch.num_targets)).sum()
    else:
        ref_logps = torch.linspace(-30, -10, batch.num_sequences)
        output = model(packed=batch, preference=PackedPreference(ref_logps, loss, num_pairs=batch.num_pairs + 1))
        values = {name: getattr(output, name) for name in ("loss", "losses", "logps", "rewards")}
        total = 3.0 * output.loss
    total.backward()
    values |= {f"grad {name}": weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: value.detach().clone() for name, value in values.items()}


def check_safety_net(group):
    """check_split passes a model, and refuses one of which a layer reads the row before."""
    model = attach_logprob_head(family_model("llama"))
    check_split(model, group)

    def shifted(module, inputs, output):
        return output + output.roll(1, dims=1)

    handle = model.model.layers[0].mlp.register_forward_hook(shifted)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: .* where its rows are split over \d processes"):
        check_split(model, group)
    handle.remove()


def rank_main(rank, port, folder, world, names):
    """Run cases on this rank, and write the values to a file."""
    become_rank(rank, world, port)
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    check_safety_net(group)
    torch.save({name: run(group, **CASES[name]) for name in names}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
