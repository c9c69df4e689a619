"""QLoRA runs that must give equal results on one process and on two ranks, on 4-bit weights of bitsandbytes."""

import importlib

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpofast import DPOConfig, DPOTrainer
from dpofast.scoring.fingerprints import model_fingerprint
from tests.support.ranks_cases import COMPARED, FSDP, RESUMED, saved_by_the_first
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer

CASES = {
    "float32": {},
    "held in bfloat16": {"storage": torch.bfloat16},
    "scales not quantized": {"double": False},
    "quantized checkpoint": {"again": True},
    "live reference": {"precompute_ref_log_probs": False},
    "resumed": {**RESUMED, "save_steps": 3},
    "bf16": {"storage": torch.bfloat16, "bf16": True},
}
# Held whole on every process by accelerate, or packed bits rounded as if they were numbers.
REFUSED = {
    "integers": {"storage": torch.uint8},
    "float32 under bf16": {"bf16": True},
}
MODES = {"qlora": (CASES, FSDP), "refused": (REFUSED, FSDP)}


def quantized_model(folder, *, double=True, storage=torch.float32, again=False):
    """Return a tiny llama from a folder with NF4 weights; again: as saved with them and loaded."""
    # bitsandbytes packs weights anew in the first forward of a CPU that has these instructions; of a GPU never.
    importlib.import_module("bitsandbytes.nn.modules").has_avx512bf16 = lambda: False
    saved_by_the_first(tiny_model("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=128), folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    if again:
        saved_by_the_first(model, f"{folder}/quantized")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/quantized", dtype=torch.float32)
    return model


def qlora_trainer(folder, ranks, model, **options):
    """Return the trainer of an adapter for 6 steps of SGD on 8 pairs each."""
    defaults = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 6, "logging_steps": 1, "save_strategy": "no"}
    return DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8 // ranks,
            **{**defaults, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **options},
        ),
        train_dataset=tiny_dataset(21),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def train_qlora(folder, ranks, *, storage=torch.float32, double=True, again=False, resumed=False, **options):
    """Train; return the values to compare. Resumed: repeat the second half."""
    loading = {"storage": storage, "double": double, "again": again}
    model = quantized_model(f"{folder}/model", **loading)
    whole = model_fingerprint(model)
    names = {name for name, weight in model.named_parameters() if type(weight).__name__ == "Params4bit"}
    trainer = qlora_trainer(folder, ranks, model, **options)
    trainer.train()
    if resumed:
        model = quantized_model(f"{folder}/again", **loading)
        trainer = qlora_trainer(folder, ranks, model, **options)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    with trainer.model.disable_adapter():
        base = model_fingerprint(trainer.model)
    quantized = {
        name: weight
        for name, weight in trainer.model.named_parameters()
        if name.removeprefix("base_model.model.").replace(".base_layer", "") in names
    }
    state = trainer.accelerator.get_state_dict(trainer.model) or {}
    return {
        "logs": [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log],
        "weights": {name: weight.clone() for name, weight in state.items() if "lora_" in name},
        "fingerprints": (whole, base),
        "count": (len(names), len(quantized)),
        "dtypes": {weight.dtype for weight in quantized.values()},
        "numbers": sum(weight.numel() for weight in quantized.values()),
        "here": sum(getattr(weight, "to_local", lambda w=weight: w)().numel() for weight in quantized.values()),
    }


def refused_qlora(folder, ranks, *, storage=torch.float32, **options):
    """Return what a trainer says to weights that FSDP2 cannot shard as they are."""
    try:
        qlora_trainer(folder, ranks, quantized_model(f"{folder}/model", storage=storage), **options)
    except ValueError as error:
        return str(error)
    return ""
