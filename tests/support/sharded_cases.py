"""Runs whose policy and reference FSDP2 has sharded before the reference pass, and what they are compared by."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpofast import DPOConfig, DPOTrainer
from dpofast.scoring import ref_cache
from dpofast.scoring.fingerprints import model_fingerprint
from dpofast.scoring.ref_cache import CACHE_FOLDER
from dpofast.training import ref_model as reference_module
from dpofast.training.parallel import early
from dpofast.training.parallel.early import on_shards
from dpofast.training.ref_model import unwrapped
from tests.support.ranks_cases import COMPARED, FSDP, TRAINING, saved_by_the_first, shared_prompts
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer

LORA = {"lora": True}
OWN = {"reference": {"num_hidden_layers": 2}}
CASES = {
    "plain": {},
    "one row more than a window": {"rows": 9},  # the second rank has two idle forwards, and no row in the second round
    "lora": LORA,
    "reference of its own": OWN,
    "bf16": {"bf16": True, "max_tokens": 1},
    "from bfloat16 files": {"files": torch.bfloat16},
}
FURTHER = {
    "tied": {"family": "llama-tied"},
    "reference of another family": {"reference": {"family": "qwen2"}},
    "reference of its own, live": {**OWN, "precompute_ref_log_probs": False},
    "reference of its own, bf16": {**OWN, "bf16": True, "max_tokens": 1},
    "live": {"precompute_ref_log_probs": False},
    "lora, live": {**LORA, "precompute_ref_log_probs": False},
    "adapter that came, live": {"lora": "before", "precompute_ref_log_probs": False},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing by accelerate": {"checkpointing_by_accelerate": True},
    "more ranks than rows of LoRA": {"lora": 1},
    "experts": {"family": "mixtral"},
    "from bfloat16 files, bf16": {"files": torch.bfloat16, "bf16": True, "max_tokens": 1},
    "from bfloat16 files, live": {"files": torch.bfloat16, "precompute_ref_log_probs": False},
    "from bfloat16 files, experts": {"files": torch.bfloat16, "family": "mixtral"},
    "from bfloat16 files, tied": {"files": torch.bfloat16, "family": "llama-tied"},
    "from bfloat16 files, lora": {"files": torch.bfloat16, **LORA},
}
MODES = {"sharded": (CASES, FSDP), "further": (FURTHER, FSDP)}
WINDOW = 8


class Gathered(TorchDispatchMode):
    """The most bytes of parameters, whole and sharded, that were alive in a storage during any operation."""

    def __init__(self, *models):
        super().__init__()
        self.models, self.most = models, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = {}
        for model in self.models:
            for module in model.modules():
                state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
                group = getattr(state, "_fsdp_param_group", None)
                for param in group.fsdp_params if group else ():
                    whole = getattr(param, "_unsharded_param", None)
                    for tensor in (param._sharded_param_data, *([] if whole is None else [whole])):
                        storage = tensor.untyped_storage()
                        storages[id(storage._cdata), storage._cdata] = storage.nbytes()
                    for tensor in param.all_gather_outputs:
                        storages[0, tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        by_address = {address: nbytes for (_, address), nbytes in storages.items()}
        self.most = max(self.most, sum(by_address.values()))
        return func(*args, **(kwargs or {}))


def sharded(folder, ranks, *, family="llama", rows=21, lora=False, reference=None, checkpointing_by_accelerate=False,
            cache=None, files=None, **options):  # fmt: skip
    """Ten steps of SGD on 8 pairs each, in windows of 8 rows; the reference columns, what they cost, and the result.

    With files, a dtype, the model is given by the name of its folder.
    """
    from peft import LoraConfig, get_peft_model

    if checkpointing_by_accelerate and "fsdp_config" in options:
        options["fsdp_config"] = {**options["fsdp_config"], "activation_checkpointing": True}
    model, peft_config = tiny_model(family), None
    if lora:
        peft_config = LoraConfig(
            r=4 if lora in (True, "before") else lora, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if lora == "before":
        torch.manual_seed(0)
        model, peft_config = get_peft_model(model, copy.copy(peft_config)), None
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    if files is not None:
        saved_by_the_first(model.to(files), f"{folder}/given")
        model = f"{folder}/given"
    ref_model = None
    if reference is not None:
        ref_model = tiny_model(**{"family": family, **reference})
    windows, most, loaded = [], [], []
    plain, with_columns = ref_cache.response_logps, reference_module.add_reference_columns

    def counting(examples, *args):
        windows.append(len(examples))
        return plain(examples, *args)

    def sharding(accelerator, whole):
        loaded.append({str(weight.dtype) for weight in whole.parameters() if weight.is_floating_point()})
        return prepare(accelerator, whole)

    def measuring(dataset, asked, *args, **more):
        with Gathered(asked) as gathered:
            result = with_columns(dataset, asked, *args, **more, window=WINDOW)
        most.append(gathered.most)
        return result

    ref_cache.response_logps, reference_module.add_reference_columns = counting, measuring
    prepare, early.fsdp2_prepare_model = early.fsdp2_prepare_model, sharding
    try:
        trainer = DPOTrainer(
            model,
            ref_model,
            args=DPOConfig(
                output_dir=str(folder),
                per_device_train_batch_size=8 // ranks,
                per_device_eval_batch_size=4 // ranks,
                ref_cache_dir=cache and str(cache),
                **{**TRAINING, **options},
            ),
            train_dataset=shared_prompts().select(range(rows)),
            eval_dataset=tiny_dataset(7, seed=3),
            processing_class=tiny_tokenizer(),
            peft_config=peft_config,
        )
        begin = trainer.evaluate()
        kinds = {type(weight) for weight in trainer.model.parameters()}
        gone = reference is not None and trainer.args.precompute_ref_log_probs
        further = {} if gone else trainer.evaluate(tiny_dataset(5, seed=4))
    finally:
        ref_cache.response_logps, reference_module.add_reference_columns = plain, with_columns
        early.fsdp2_prepare_model = prepare
    with trainer._reference.of(unwrapped(trainer.model)) as asked, on_shards(asked):
        fingerprint = model_fingerprint(asked, trainer._forward_dtype)
    identity = trainer.run_identity()
    trainer.train()
    logs = [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log]
    optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    trainer.save_model(f"{folder}/end")
    trainer.ranks.barrier()
    (saved,) = Path(folder, "end").glob("*.safetensors")
    names = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in trainer.train_dataset.column_names]
    return {
        "columns": [list(trainer.train_dataset[name]) for name in names],
        "begin": {k: v for k, v in begin.items() if k.removeprefix("eval_") in COMPARED},
        "further": {k: v for k, v in further.items() if k.removeprefix("eval_") in COMPARED},
        "logs": logs,
        "end": {k: v for k, v in trainer.evaluate().items() if k.removeprefix("eval_") in COMPARED},
        "saved": load_file(saved),
        "windows": windows,
        "most": most,
        "loaded": loaded,
        "identity": identity,
        "fingerprint": fingerprint,
        "optimized": optimized,
        "keys": sorted(path.name for path in Path(folder, CACHE_FOLDER).glob("*")),
        "sharded": DTensor in kinds,
        "units": units_of(trainer.model),
    }


def units_of(model):
    """The float32 bytes of each of FSDP2's units of a model, whole."""
    groups = {}
    for module in model.modules():
        group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None) if isinstance(module, FSDPModule) else None
        if group is not None:
            groups[id(group)] = sum(4 * param.sharded_param.numel() for param in group.fsdp_params)
    return list(groups.values())
