"""Training runs with tensor parallelism, which must equal those of one process, by rank_main() of ranks_cases."""

from pathlib import Path

from safetensors.torch import load_file

from dpofast import DPOConfig, DPOTrainer
from dpofast.checkpointing.fsdp import gathered
from tests.support.families import family_model
from tests.support.ranks_cases import COMPARED, PAIRS, RESUMED, dialogues, saved_by_the_first, shared_prompts
from tests.support.tiny import tiny_dataset, tiny_tokenizer

__all__ = ["CASES", "MODES", "dialogues", "train_split"]

# Cases of both sizes: the model's family and the trainer's options.
CASES = {
    "plain": {},
    "several micro-batches": {"max_tokens": 24},
    "dialogues": {"dataset": dialogues, "max_tokens": 60},
    "live reference": {"precompute_ref_log_probs": False, "max_tokens": 24},
    "token statistics": {"token_statistics": True, "max_tokens": 24},
    "checkpointing": {"gradient_checkpointing": True, "max_tokens": 24},
    "aot": {"loss_type": "aot", "max_tokens": 24},
    "weighted": {"use_weighting": True},
    "clipped": {"max_grad_norm": 0.1},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 3},
    "lora": {"lora": True},
    "lora live": {"lora": True, "precompute_ref_log_probs": False, "max_tokens": 24},
    "lora aot": {"lora": True, "loss_type": "aot", "max_tokens": 24},
    "qwen3": {"family": "qwen3", "max_tokens": 24},
    "qwen3 checkpointing": {"family": "qwen3", "max_tokens": 24, "gradient_checkpointing": True},
    "tied": {"family": "llama", "extra": {"tie_word_embeddings": True}},
    "experts": {"family": "qwen3-moe"},
    "resumed": RESUMED,
    "resumed lora": {**RESUMED, "lora": True},
}
FEW = ("several micro-batches", "qwen3", "lora aot", "live reference")
GROUPED = {name: case for name, case in CASES.items() if name != "tied"}  # refused
MODES = {
    "tp2": (CASES, {"tensor_parallel_size": 2}),
    "tp2dp2": (GROUPED, {"tensor_parallel_size": 2}),
    "few": ({name: CASES[name] for name in FEW}, {"tensor_parallel_size": 2}),
}


def train_split(
    folder, ranks, *, dataset=shared_prompts, lora=False, family="llama", extra=None, resumed=False, **options
):
    """Train ten steps of SGD on 8 pairs each, of a model that is given by its folder; return the values to compare."""
    folder = Path(folder)
    saved_by_the_first(family_model(family, **(extra or {})), folder / "model")
    trainer = split_trainer(folder, ranks, dataset, lora, options)
    trainer.train()
    if resumed:
        trainer = split_trainer(folder, ranks, dataset, lora, options)
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-5"))
    logs = [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log]
    metrics = {k: v for k, v in trainer.evaluate().items() if k.removeprefix("eval_") in COMPARED}
    weights = {name: gathered(weight.detach()).clone() for name, weight in trainer.model.named_parameters()}
    trainer.save_model(str(folder / "end"))
    trainer.ranks.barrier()
    (saved,) = (folder / "end").glob("*.safetensors")
    own = sum((w.to_local() if hasattr(w, "to_local") else w).numel() for w in trainer.model.parameters())
    return {"logs": logs, "eval": metrics, "weights": weights, "saved": load_file(saved), "own": own}


def split_trainer(folder, ranks, dataset, lora, options):
    """Return the trainer of a case."""
    peft_config = None
    if lora:
        from peft import LoraConfig

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft_config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    defaults = {
        **{"optim": "sgd", "learning_rate": 0.05, "max_steps": 10, "logging_steps": 1, "save_strategy": "no"},
        **{"report_to": "none", "disable_tqdm": True, "use_cpu": True},
    }
    return DPOTrainer(
        str(folder / "model"),
        args=DPOConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=8 // ranks,
            per_device_eval_batch_size=4 // ranks,
            **{**defaults, **options},
        ),
        train_dataset=dataset(),
        eval_dataset=tiny_dataset(7, seed=3),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


assert PAIRS % 8  # the last step is uneven
