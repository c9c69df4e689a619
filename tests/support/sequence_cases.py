"""Training runs under sequence parallelism that must equal the same runs on one process."""

from tests.support.ranks_cases import (
    BEST,
    CASES,
    FSDP,
    LIST_CASES,
    MODES,
    PAIRS,
    RESUMED,
    dialogues,
    lists,
    train,
    trainer_of,
)
from tests.support.tiny import tiny_dataset


def streamed():
    """Return tiny pairs as a stream."""
    return tiny_dataset(PAIRS).to_iterable_dataset()


OFFLOADED = {"gradient_checkpointing": True, "activation_offloading": True, "max_tokens": 40}
LIVE = {"precompute_ref_log_probs": False}
# Few, for the default suite: each has several things that sequence parallelism could break.
FEW = {
    "plain": {},
    "offloaded, live": {**OFFLOADED, **LIVE, "dataset": dialogues},
    "lora, aot": {**LIVE, "lora": True, "loss_type": "aot", "max_tokens": 24},
    "counted": {**LIVE, "counted": True, "loss_type": "bco_pair", "bco_delta": "running_mean", "max_tokens": 24},
}
MATRIX = {
    "dialogues": CASES["dialogues"],
    "not shared": CASES["not shared"],
    "live reference": LIVE,
    "moving reference": CASES["moving reference"],
    "token statistics": CASES["token statistics"],
    "rpo": CASES["rpo"],
    "weighted": CASES["weighted"],
    "ld": CASES["ld"],
    "aot": {"loss_type": "aot", "max_tokens": 24},
    "aot, one micro-batch": {"loss_type": "aot"},
    "lora": {"lora": True},
    "lora, rpo, offloaded": {"lora": True, "rpo_alpha": 1.0, **OFFLOADED},
    "offloaded": OFFLOADED,
    "one pair a rank": {"pairs": 2, **OFFLOADED},
    "tied": CASES["tied"],
    "accumulation": CASES["accumulation"],
    "evaluated": CASES["evaluated"],
    "best model": BEST,
    "resumed": RESUMED,
    "resumed lora": {**RESUMED, "lora": True},
    "lists": {"dataset": lists, "loss_type": "plackett_luce", "max_tokens": 30},
    "lists, weights of tokens": LIST_CASES["plackett_luce, live reference"],
    "columns": LIST_CASES["columns"],
    "auto": {"max_tokens": "auto"},
    "stream": {"dataset": streamed, "max_tokens": 40},
}
SHARDED = ("lora, aot", "rpo", "offloaded", "lora", "aot", "best model", "resumed", "lists", "tied", "live reference")
ZERO = ("plain", "rpo", "aot")
ALL = {**FEW, **MATRIX}

SP2 = {"sequence_parallel_size": 2}
SP4 = {"sequence_parallel_size": 4}
SEQUENCE_MODES = {
    "few": (FEW, SP2),
    "sp2": (MATRIX, SP2),
    "sp2 dp2": (ALL, SP2),
    "sp4": ({name: ALL[name] for name in ("plain", "offloaded, live", "lora, aot", "one pair a rank")}, SP4),
    "sp2 fsdp": ({name: ALL[name] for name in SHARDED}, {**SP2, **FSDP}),
    **{f"sp2 {zero}": ({name: ALL[name] for name in ZERO}, {**SP2, **MODES[zero][1]}) for zero in ("zero2", "zero3")},
    "sp2 fsdp4": ({name: ALL[name] for name in ("rpo", "offloaded", "lora, aot", "one pair a rank")}, {**SP2, **FSDP}),
}


def run(folder, ranks, *, counted=False, **options):
    """Train a case, as ranks_cases.train, or with counts of what Trainer reports and predictions."""
    return counts(folder, ranks, **options) if counted else train(folder, ranks, **options)


def counts(folder, ranks, **options):
    """Train, predict, and return what counts pairs, positions and operations."""
    trainer, _ = trainer_of(folder, ranks, include_num_input_tokens_seen="all", **options)
    trainer.train()
    predicted = trainer.predict(tiny_dataset(7, seed=5))
    last = [log for log in trainer.state.log_history if "num_tokens" in log][-1]
    return {
        "predictions": predicted.predictions,
        "metrics": {
            name: value for name, value in predicted.metrics.items() if not name.endswith(("_second", "_runtime"))
        },
        "positions": (trainer.state.num_input_tokens_seen, last["num_tokens"]),
        "operations": trainer.state.total_flos,
        "pairs": trainer.get_total_train_batch_size(trainer.args),
        "running": trainer._running_rewards.sums.tolist(),
        "weights": {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()},
    }
