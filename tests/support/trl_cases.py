"""A trl training run on a tiny model, with and without patch_trl(), for the tests of the drop-in."""

import copy

import torch
import trl
import trl.trainer.dpo_trainer as trl_module
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from dpofast.integrations.trl import patch_trl, unpatch_trl
from tests.support.deep_examples import DEEP
from tests.support.tiny import VOCAB, tiny_model, tiny_pairs

# Not measured in nats, or not a function of the work.
NOT_COMPARED = ("runtime", "per_second", "epoch", "flos", "mfu")


def word_tokenizer():
    """Words "3" to "96", separated by spaces: text that trl can tokenize."""
    names = {1: "<eos>", 2: "<pad>"}
    words = Tokenizer(models.WordLevel({names.get(i, str(i)): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def text_pairs(count=24, seed=0, longest=9):
    """tiny_pairs as text."""

    def text(ids):
        return " ".join(map(str, ids))

    return Dataset.from_list(
        [
            {
                "prompt": text(pair["prompt_ids"]),
                "chosen": " " + text(pair["chosen_ids"]),
                "rejected": " " + text(pair["rejected_ids"]),
            }
            for pair in tiny_pairs(count, seed, longest)
        ]
    )


def deep_pairs():
    """The pairs of DEEP as text: rows that share a system prompt, go on earlier turns and fork late."""
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(map(str, row["prompt_ids"])),
                **{
                    name: " " + " ".join(map(str, row["branches"][side]))
                    for name, side in zip(("chosen", "rejected"), pair, strict=True)
                },
            }
            for row in DEEP
            for pair in row["pairs"]
        ]
    )


class Gradients(TrainerCallback):
    """The gradients of the first optimizer step, by parameter name."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            self.first = {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def config(folder, **options):
    """trl's DPOConfig for a short run on the CPU."""
    return trl.DPOConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 20,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            **options,
        },
    )


def build(
    folder,
    *,
    model=None,
    ref_model=None,
    data=None,
    callbacks=(),
    peft_config=None,
    eval_data=None,
    processor=None,
    data_collator=None,
    **options,
):
    """A trl.DPOTrainer on a tiny Llama; the reference is a copy of the model unless PEFT gives one."""
    model = tiny_model() if model is None else model
    if ref_model is None and peft_config is None and not hasattr(model, "peft_config"):
        ref_model = copy.deepcopy(model)
    if options.get("precompute_ref_log_probs") and hasattr(trl_module, "add_fused_lm_head"):
        ref_model = None  # older trainers would load one from a folder
    return trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=config(folder, **options),
        train_dataset=text_pairs() if data is None else data,
        eval_dataset=eval_data,
        processing_class=word_tokenizer() if processor is None else processor,
        data_collator=data_collator,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def train(folder, *, patched, level="forward", **options):
    """Train; returns the trainer and the gradients of its first step."""
    unpatch_trl()
    gradients = Gradients()
    if patched:
        patch_trl(level=level)
    try:
        torch.manual_seed(0)
        trainer = build(folder, callbacks=[gradients], **options)
        trainer.train()
    finally:
        unpatch_trl()
    return trainer, gradients.first


def assert_same_run(plain, fast, *, metrics=1e-4, gradients=1e-5, apart=()):
    """Assert equal logs within `metrics`, except names that contain one of `apart`, and equal first gradients.

    Gradients are compared within `gradients`.
    """
    (trainer, grads), (fast_trainer, fast_grads) = plain, fast
    logs, fast_logs = trainer.state.log_history, fast_trainer.state.log_history
    assert len(logs) == len(fast_logs)
    for step, (log, fast_log) in enumerate(zip(logs, fast_logs, strict=True)):
        assert log.keys() == fast_log.keys()
        for name in log:
            if not any(part in name for part in (*NOT_COMPARED, *apart)):
                assert abs(log[name] - fast_log[name]) <= metrics, (step, name, log[name], fast_log[name])
    assert grads.keys() == fast_grads.keys() and grads
    for name, grad in grads.items():
        assert (grad - fast_grads[name]).abs().max() <= gradients, name
