"""Training runs on images and text that must give equal results on one process and on two ranks."""

from dpofast import DPOConfig, DPOTrainer
from tests.support.ranks_cases import COMPARED, FSDP, RunsOutOfMemory, two_ranks
from tests.support.vision_models import vision_model
from tests.support.vision_processors import picture, processor_of
from tests.support.vision_training import image_dataset

# The image of each pair, four a step: one rank has images, none, both, both of one prompt, one or both by their sizes.
STEPS = (
    *(0, None, None, None),
    *(None, None, None, None),
    *(1, 2, 3, 4),
    *(5, 5, None, None),
    *(6, None, 7, None),
)
LATE = STEPS[4:8] * 2 + STEPS[8:]  # no image in the first two steps
_EACH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
# Weights that no gradient reaches are left alone, and decay where one of zeros does; eps keeps rounding small.
_ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.5, "adam_epsilon": 1e-3}
CASES = {
    "qwen2_vl": {},
    "idefics3": {"family": "idefics3"},
    "llava": {"family": "llava"},
    "max_tokens 40": {"max_tokens": 40},
    "idefics3, max_tokens 40": {"family": "idefics3", "max_tokens": 40},
    "adamw": {**_ADAMW, "max_tokens": 40},
    "live reference": {"precompute_ref_log_probs": False, "max_tokens": 40},
    "aot": {"loss_type": "aot", "max_tokens": 40},
    "aot, live reference": {"loss_type": "aot", "precompute_ref_log_probs": False, "max_tokens": 40},
    "checkpointing": {"gradient_checkpointing": True, "max_tokens": 40},
    "one pair a rank": {"pairs": 2},
    "lora": {"lora": True, "max_tokens": 40},
    "frozen tower": {"freeze_vision_tower": True, "max_tokens": 40},
    "lora live": {"lora": True, "precompute_ref_log_probs": False},
    "padded": {"padded": True, "max_tokens": 120},
    "gemma3 padded": {"family": "gemma3", "padded": True},
    "out of memory": {"fails": {"most": 60, "rank": 1}},
}
FSDP_CASES = {
    **{name: case for name, case in CASES.items() if name != "out of memory"},
    "synchronized each time": {"max_tokens": 40, "accelerator_config": _EACH},
}
# From the checkpoint of step 2. No gradient reaches the last layer of LLaVA's tower, or a tower before its first image.
# (Qwen2-VL's processor cannot be saved without torchvision.)
RESUMED = {**_ADAMW, "resumed": True, "save_strategy": "steps", "save_steps": 2}
RESUMED_CASES = {
    "resumed llava": {**RESUMED, "family": "llava"},
    "resumed before the first image": {**RESUMED, "family": "idefics3", "images": LATE},
    "resumed llava before the first image": {**RESUMED, "family": "llava", "images": LATE},
    "resumed sgd": {**RESUMED, "family": "idefics3", "optim": "sgd"},
}
# One group of pairs a micro-batch, as in ranks_cases.
BF16_CASES = {family: {"family": family, "bf16": True, "max_tokens": 1} for family in ("qwen2_vl", "llava")}
MODES = {
    "ddp": (CASES, {}),
    "fsdp": (FSDP_CASES, FSDP),
    "resumed": (RESUMED_CASES, FSDP),
    "bf16": (BF16_CASES, FSDP),
}


def pairs_of(family, images, seed=0):
    """Pairs with these images: the number of a picture, or None for text alone."""
    drawn = [[] if number is None else [picture(number, 16 + 8 * (number % 3), 24)] for number in images]
    return image_dataset(family, len(images), images=drawn, seed=seed)


def train(folder, ranks, *, resumed=False, **options):
    """Train over the steps; return the values to compare. Resumed: again from step 2, the first run's beside them."""
    run = results_of(trainer_of(folder, ranks, **options))
    if not resumed:
        return run
    return {**results_of(trainer_of(folder, ranks, **options), f"{folder}/checkpoint-2"), "uninterrupted": run}


def trainer_of(folder, ranks, *, family="qwen2_vl", pairs=4, images=STEPS, lora=False, fails=None, **options):
    """Return the trainer of a case."""
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    defaults = {"optim": "sgd", "learning_rate": 0.05, "save_strategy": "no"}
    model = vision_model(family)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=pairs // ranks,
            per_device_eval_batch_size=4 // ranks,
            num_train_epochs=1,
            logging_steps=1,
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **{**defaults, **options},
        ),
        train_dataset=pairs_of(family, images),
        eval_dataset=pairs_of(family, (None, None, 8, None, None, 9, None), seed=1),
        processing_class=processor_of(family),
        peft_config=peft_config,
    )
    if fails is not None:
        RunsOutOfMemory(model, **fails)
    return trainer


def results_of(trainer, checkpoint=None):
    """Train and return the values to compare."""
    trainer.train(resume_from_checkpoint=checkpoint)
    wrapped = type(trainer.model_wrapped).__name__
    logs = [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log]
    metrics = {k: v for k, v in trainer.evaluate().items() if k.removeprefix("eval_") in COMPARED}
    weights = trainer.accelerator.get_state_dict(trainer.model)  # under FSDP of the first rank
    return {"logs": logs, "eval": metrics, "weights": {k: v.clone() for k, v in weights.items()}, "wrapped": wrapped}


def two_image_ranks(mode):
    """A fixture with the results of one of MODES on two ranks."""
    return two_ranks(mode, run=train, modes=MODES)
