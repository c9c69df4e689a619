"""The adapter of `dpofast train`: a new LoRA adapter from its options, or one that was trained before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpofast.model.parts import backbone_of, is_composite


@dataclass(kw_only=True)
class LoraArguments:
    """Options of a new LoRA adapter, under trl's names."""

    lora_r: int = field(
        default=0, metadata={"help": "Rank of a LoRA adapter on every linear layer; 0 trains all weights."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha; default 16."})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "LoRA's dropout, default 0; needs --no_disable_dropout, like any dropout."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the layers that get the adapter. Default: every linear one but the LM head; of a model "
            "that also takes images or sound, those of its language model. all-linear: those of its other parts too."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by alpha/sqrt(r), not alpha/r (rsLoRA)."}
    )

    def adapter_options(self) -> list[str]:
        """Returns the names of the options that only an adapter uses and that are set."""
        every = ("lora_alpha", "lora_dropout", "lora_target_modules")
        return [name for name in every if getattr(self, name) is not None] + ["use_rslora"] * self.use_rslora

    def check_lora(self, *, disable_dropout: bool) -> None:
        """Raise ValueError for a value out of range, and for options that would have no effect."""
        if self.lora_r < 0:
            raise ValueError(f"lora_r: expected 0 (train all weights) or a rank of 1 or more, got {self.lora_r}")
        if self.lora_r == 0 and (given := self.adapter_options()):
            raise ValueError(
                f"{given[0]}: {getattr(self, given[0])} has no effect without an adapter: add its rank, --lora_r 16"
            )
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha: expected 1 or more, got {self.lora_alpha}")
        if not 0 <= (self.lora_dropout or 0) < 1:
            raise ValueError(f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout}")
        if self.lora_dropout and disable_dropout:
            raise ValueError(
                f"lora_dropout: {self.lora_dropout} has no effect while disable_dropout sets every dropout to 0: add "
                "--no_disable_dropout, or leave it out"
            )

    def lora_config(self) -> Any:
        """Returns peft's LoraConfig, or None for rank 0.

        Raises:
            ValueError: peft is not installed.
        """
        if self.lora_r == 0:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError("lora_r: LoRA needs peft: pip install peft") from error
        targets = self.lora_target_modules or ["all-linear"]
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=16 if self.lora_alpha is None else self.lora_alpha,
            # By default none: it would make the policy differ from its reference at step 0.
            lora_dropout=self.lora_dropout or 0.0,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_rslora=self.use_rslora,
            task_type="CAUSAL_LM",
        )


def on_language_model(config: Any, model: Any) -> int:
    """Let a LoraConfig on all linear layers leave out what a composite model has beside its language model.

    Returns:
        How many layers get the adapter; 0 where the model is no composite and the config stays as it is.
    """
    if not is_composite(model):
        return 0
    from torch import nn

    inside = {id(module) for module in backbone_of(model).modules()} - {id(model.get_output_embeddings())}
    named = model.named_modules()
    config.target_modules = {name for name, part in named if isinstance(part, nn.Linear) and id(part) in inside}
    return len(config.target_modules)


def train_on(model: Any) -> Any:
    """Make the adapter of a PEFT model that was loaded for inference trainable, and nothing else. Returns the model."""
    name = model.active_adapter
    model.requires_grad_(False)
    model.peft_config[name].inference_mode = False
    model.set_adapter(name)
    return model
