"""Runs whose policy and reference ZeRO-3 partitions before the reference pass, or at load; resident bytes."""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dpofast import DPOConfig, DPOTrainer
from dpofast.training import ref_model as reference_module
from tests.support.ranks_cases import COMPARED, TRAINING, _zero, dialogues, shared_prompts
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer

OWN = {"reference": {"num_hidden_layers": 2}}
CASES = {
    "plain": {},
    "dialogues": {"dataset": dialogues, "max_tokens": 60},
    "aot": {"loss_type": "aot", "max_tokens": 24},
    "lora": {"lora": True, "rows": 9},
    "reference of its own": OWN,
    "partitioned at load": {"at_load": True},
    "by name, lora": {"at_load": "name", "lora": True},
}
FURTHER = {
    "tied": {"family": "llama-tied"},
    "rpo": {"rpo_alpha": 1.0, "max_tokens": 24},
    "reference of another family": {"reference": {"family": "qwen2"}},
    "reference of its own, live": {**OWN, "precompute_ref_log_probs": False},
    "reference of its own, at load": {**OWN, "at_load": True},
    "live": {"precompute_ref_log_probs": False},
    "lora, live": {"lora": True, "precompute_ref_log_probs": False},
    "lora, at load": {"lora": True, "at_load": True},
    "tied, at load": {"family": "llama-tied", "at_load": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_tokens": 24},
    "checkpointing": {"gradient_checkpointing": True},
    "experts": {"family": "mixtral"},
    "experts, at load": {"family": "mixtral", "at_load": True},
}
SMALL = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
         "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}  # fmt: skip
ZERO3 = _zero(3)
ZERO3["zero_optimization"] = {**ZERO3["zero_optimization"], **SMALL}
MODES = {"zero": (CASES, {"deepspeed": ZERO3}), "zero further": (FURTHER, {"deepspeed": ZERO3})}


class Resident(TorchDispatchMode):
    """The most bytes of parameters, shares and whole ones, during any operation."""

    def __init__(self, *models):
        super().__init__()
        self.models, self.most = models, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = {}
        for model in self.models:
            for weight in model.parameters():
                for tensor in (weight.data, getattr(weight, "ds_tensor", None)):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        self.most = max(self.most, sum(storages.values()))
        return result


def partitioned(folder, ranks, *, family="llama", dataset=shared_prompts, rows=21, lora=False, reference=None,
                at_load=False, **options):  # fmt: skip
    """Ten steps of SGD on 8 pairs each; the reference columns, what they cost, and the result."""
    from peft import LoraConfig

    model = tiny_model(family)
    num_bytes = sum(4 * weight.numel() for weight in model.parameters())
    layer = sum(4 * weight.numel() for weight in model.model.layers[0].parameters())
    ref_model = None if reference is None else tiny_model(**{"family": family, **reference})
    accumulation = options.get("gradient_accumulation_steps", 1)

    def config():
        return DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8 // ranks // accumulation,
            per_device_eval_batch_size=4 // ranks,
            **{**TRAINING, **options},
        )

    if at_load:
        saved = f"{folder}/model"
        for path, each in ((saved, model), (f"{saved}/reference", ref_model)):
            if each is not None and int(os.environ.get("RANK", 0)) == 0:
                each.save_pretrained(path)
        args = config()  # from here on transformers partitions what it loads
        if ranks > 1:
            from deepspeed import comm

            comm.init_distributed(dist_backend="gloo")  # as accelerate does, but on processors
            torch.distributed.barrier()
        model = saved if at_load == "name" else AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        if ref_model is not None:
            ref_model = AutoModelForCausalLM.from_pretrained(f"{saved}/reference", dtype=torch.float32)
    else:
        args = config()
    most, with_columns = [], reference_module.add_reference_columns

    def measuring(rows, asked, *args, **more):
        with Resident(asked) as resident:
            result = with_columns(rows, asked, *args, **more, window=8)
        most.append(resident.most)
        return result

    reference_module.add_reference_columns = measuring
    try:
        trainer = DPOTrainer(
            model,
            ref_model,
            args=args,
            train_dataset=dataset().select(range(rows)),
            eval_dataset=tiny_dataset(7, seed=3),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        )
        begin = trainer.evaluate()
        further = trainer.evaluate(tiny_dataset(5, seed=4)) if reference is None else {}  # released by then
    finally:
        reference_module.add_reference_columns = with_columns
    early = all(hasattr(weight, "ds_id") for weight in trainer.model.parameters())
    reference_early = trainer.ref_model is None or all(hasattr(p, "ds_id") for p in trainer.ref_model.parameters())
    identity = trainer.run_identity()
    trainer.train()
    logs = [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log]
    end = trainer.evaluate()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    names = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in trainer.train_dataset.column_names]
    return {
        "columns": [list(trainer.train_dataset[name]) for name in names],
        "begin": {k: v for k, v in begin.items() if k.removeprefix("eval_") in COMPARED},
        "further": {k: v for k, v in further.items() if k.removeprefix("eval_") in COMPARED},
        "end": {k: v for k, v in end.items() if k.removeprefix("eval_") in COMPARED},
        "logs": logs,
        "weights": {k: v.clone() for k, v in (state or {}).items()},
        "identity": {k: v for k, v in identity.items() if k != "examples per step"},
        "flops": trainer.state.total_flos,
        "keys": sorted(os.listdir(f"{folder}/reference")) if names else [],
        "bytes": num_bytes,
        "layer": layer,
        "most": most,
        "early": early and reference_early,
        "wrapped": type(trainer.model_wrapped).__name__,
    }
