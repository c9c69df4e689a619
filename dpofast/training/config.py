"""DPOConfig: transformers' TrainingArguments plus the options of a DPO run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available
from transformers import TrainingArguments

from dpofast.common.names import did_you_mean
from dpofast.data.encode_pairs import TRUNCATION_MODES
from dpofast.data.lists import check_list_options
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.divergences import DIVERGENCES
from dpofast.losses.kinds import KINDS, KINDS_ALSO_CALLED
from dpofast.losses.own_kinds import is_own, name_of
from dpofast.packing.arguments import sharing
from dpofast.training.checks.options import check_options
from dpofast.training.sampler import SAMPLING_STRATEGIES


@dataclass
class DPOConfig(TrainingArguments):
    """TrainingArguments plus the options of DPO, under TRL's names where TRL has the same option.

    Pairs per optimizer step = per_device_train_batch_size × gradient_accumulation_steps; max_tokens alone decides how
    many of them run at once.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16 on float32 weights (mixed precision). Default: on a GPU that has it, unless "
            "fp16 or a launcher's or DeepSpeed's own setting says otherwise; off on a CPU."
        },
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Compile the decoder layers by torch.compile. Default: on a GPU, unless use_liger_kernel fuses "
            "them or the model is sharded, quantized, padded or placed by accelerate; off on a CPU."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "The checkpoint to resume: its folder, or latest: the newest of output_dir."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"The preference loss, or several, which are added up: {', '.join(KINDS)}; or module:function, one "
            "of your own."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of several losses, default 1."}
    )
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the reference model."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a preference is flipped: conservative DPO, robust, exo_pair."}
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata={"help": f"The divergence from the reference: {', '.join(DIVERGENCES)}."}
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "The alpha of alpha_divergence."})
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight in [0, 1] of tokens beyond the length of the pair's shorter response (LD-DPO), in policy "
            "and reference: reference columns in the data must be weighted so, like TRL's."
        },
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs by the policy's own probability of them (WPO)."}
    )
    rpo_alpha: float | None = field(
        default=None, metadata={"help": "Weight of the chosen response's NLL per token, added to the loss (RPO)."}
    )
    ipo_average: bool = field(default=True, metadata={"help": "ipo: log-ratios per token, not summed."})
    bco_delta: str = field(
        default="zero", metadata={"help": "bco_pair: its reward shift, zero or running_mean (of all rewards so far)."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "discopop: its temperature."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "simpo, alpha_po: the margin that is asked for."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "cpo: the weight of the chosen response's NLL."})
    alpha_po_alpha: float = field(
        default=0.25, metadata={"help": "alpha_po: the shape of its reward; 0 is that of simpo."}
    )
    dpop_lambda: float = field(
        default=50.0, metadata={"help": "dpop: the weight of a chosen response's fall below the reference."}
    )
    beta_dpo_alpha: float = field(
        default=0.6, metadata={"help": "beta_dpo: how much a step's beta follows its mean margin of rewards."}
    )
    beta_dpo_threshold: float = field(
        default=0.0, metadata={"help": "beta_dpo: the mean margin of rewards at which beta stays as it is."}
    )
    score_temperature: float = field(
        default=1.0, metadata={"help": "infonca, nca, lipo_lambda: the scores of responses are divided by it."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt plus response is cut to so many tokens, where truncation_mode says."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which part of a long row is kept: keep_start cuts the responses' ends, keep_end the start of the "
            "prompt, alike for both responses."
        },
    )
    list_pairs: str | None = field(
        default=None,
        metadata={
            "help": "What becomes of lists of responses: all, best_worst or adjacent (neighbours in rank) turns them "
            "into pairs. Default: they stay lists, for the losses of lists."
        },
    )
    min_score_gap: float | None = field(
        default=None, metadata={"help": "With list_pairs: the least difference of the scores of a pair."}
    )
    assistant_only_loss: bool = field(
        default=True,
        metadata={
            "help": "In a response of several turns only the assistant's are trained; a turn's own key train, true or "
            "false, is stronger."
        },
    )
    max_tokens: int | str | None = field(
        default=None,
        metadata={
            "help": "Packed positions per micro-batch (default 2048 on the CPU, 16384 on a GPU), or auto: what fits, "
            "probed once. Changes results by rounding only; halved where memory runs out."
        },
    )
    share: str | None = field(
        default=None,
        metadata={
            "help": "What sequences of a micro-batch compute once. prefix (the default): all that they begin with "
            "alike, such as a system prompt, earlier turns, or responses up to where they part; prompt: a prompt for "
            "its responses; none: nothing, to measure what sharing saves. Changes results by rounding only."
        },
    )
    share_prompts: bool | None = field(
        default=None, metadata={"help": "An alias: True is --share prompt, False is --share none."}
    )
    flash_attention: str | None = field(
        default=None,
        metadata={
            "help": "FA3 or FA4: FlashAttention 3 or 4 in place of torch's FlashAttention 2, where its package is "
            "installed, for the whole process."
        },
    )
    max_logits_bytes: int | None = field(
        default=None, metadata={"help": "Room for logits in bytes (default 1 GiB, on a GPU of 40 GB or more 4 GiB)."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute reference log-probs once before training, so that no reference model stays in memory. "
            "Default: true, but for sync_ref_model and for training data that is streamed."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture of experts' load-balancing loss (default: the model's own; 0: none)."},
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Let the reference follow the policy (TR-DPO): needs a reference in the step."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={"help": "TR-DPO: the policy's share in reference = alpha * policy + (1 - alpha) * reference."},
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "TR-DPO: steps between two such updates."})
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps precomputed reference log-probs, default <output_dir>/reference: a killed run "
            "goes on where it stopped, and runs that name one folder share what belongs to equal tokens, reference "
            "weights and dtype, so that a sweep over beta or losses computes it once. May be deleted at any time."
        },
    )
    token_statistics: bool = field(
        default=False,
        metadata={"help": "Also log entropy, mean logits and token accuracy: a few more passes over logits."},
    )
    padded: bool = field(
        default=False,
        metadata={
            "help": "Run padded rows through the model's own attention: for models that cannot run packed, at more "
            "work. max_tokens then counts the tokens of whole rows, without pads."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow a model's own Python code to run."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "In Python, with a model given by name: further arguments of from_pretrained, as JSON or a dict."
        },
    )
    padding_free: bool = field(default=False, metadata={"help": "TRL's name: packed rows never have pads."})
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "TRL's name: refused, as packed rows have no pads."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "TRL's name: refused, as max_tokens packs the reference pass too."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "TRL's name: refused, as packed rows have no pads; set tokenizer.pad_token."}
    )
    neftune_noise_alpha: float | None = field(
        default=None,
        metadata={
            "help": "NEFTune: uniform noise within alpha/sqrt(L*D) on the input embeddings in training, L the tokens "
            "of prompt and response. So nothing is shared in training, as by share=none; in evaluation and the "
            "reference pass it is."
        },
    )
    freeze_vision_tower: bool = field(
        default=False,
        metadata={
            "help": "Of a model that sees images, train all but the vision tower: its projector is trained. The tower "
            "then keeps no activations."
        },
    )
    tensor_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share every layer and the head of one model: its heads, columns and vocabulary are "
            "divided among them. For models that do not fit one GPU; per_device_train_batch_size counts once for all "
            "of them."
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share the positions of every micro-batch (Ulysses). For rows whose activations do "
            "not fit one GPU; per_device_train_batch_size counts once for all of them."
        },
    )
    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep what gradient_checkpointing saves of each layer in the CPU's memory: for long rows, whose "
            "layers' inputs alone fill a GPU."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the models to 0."})
    on_bad_row: str = field(
        default="raise", metadata={"help": "A bad row of the data: raise (stop) or skip (count it)."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data."})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: an option out of range, or options that exclude each other.
        """
        # Without it accelerate divides the data over CPU ranks, and synchronizes nothing.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        self.chose_bf16 = self.bf16 is None and _chooses_bf16(self)
        self.bf16 = self.chose_bf16 if self.bf16 is None else self.bf16
        self.chose_precompute = self.precompute_ref_log_probs is None
        if self.precompute_ref_log_probs is None:
            self.precompute_ref_log_probs = not self.sync_ref_model
        self._post_init_uncompiled()
        check_options(self)
        given = self.loss_type if isinstance(self.loss_type, (list, tuple)) else [self.loss_type]
        self.loss_type = [name_of(kind) for kind in given]
        unknown = [kind for kind in self.loss_type if kind not in KINDS and not is_own(kind)]
        if unknown or not self.loss_type:
            meant = did_you_mean(unknown[0], KINDS, KINDS_ALSO_CALLED) if unknown else ""
            raise ValueError(
                f"loss_type: expected one of {sorted(KINDS)}, or several of them, got {self.loss_type}{meant}"
            )
        self.preference_loss()
        for name in (
            *("per_device_train_batch_size", "gradient_accumulation_steps"),
            *("tensor_parallel_size", "sequence_parallel_size"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_steps == 0:
            raise ValueError("max_steps: expected 1 or more, or -1 for num_train_epochs, got 0, which trains nothing")
        if self.num_train_epochs <= 0 and self.max_steps < 0:
            raise ValueError(f"num_train_epochs: expected more than 0, or max_steps, got {self.num_train_epochs}")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: needs a GPU; on a CPU use bf16, or leave it out")
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected 0 or more, got {self.learning_rate}")
        if self.neftune_noise_alpha is not None and not 0 <= self.neftune_noise_alpha < float("inf"):
            raise ValueError(f"neftune_noise_alpha: expected 0 or more, got {self.neftune_noise_alpha}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: expected room for a prompt and a response token, 2, got {self.max_length}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode: expected 'keep_start' or 'keep_end', got {self.truncation_mode!r}")
        check_list_options(self.list_pairs, self.min_score_gap)
        self._resolve_share()
        self._check_max_tokens()
        self._check_moving_reference()
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise ValueError(
                f"train_sampling_strategy: expected one of {SAMPLING_STRATEGIES}, got "
                f"{self.train_sampling_strategy!r}: packing leaves no pads that sorting by length would save, and "
                "ranks are balanced anyway"
            )
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row: expected 'raise' or 'skip', got {self.on_bad_row!r}")
        # It would replace a NaN loss by an average and go on.
        self.logging_nan_inf_filter = False

    def _resolve_share(self) -> None:
        """Set share, which may be given by its alias; padded rows share nothing."""
        given = self.share is not None or self.share_prompts is not None
        self.share = sharing(self.share, self.share_prompts)
        if self.padded:
            if given and self.share != "none":
                raise ValueError(
                    f"share: padded rows share nothing, got {self.share!r} with padded=True: leave one out"
                )
            self.share = "none"

    def _post_init_uncompiled(self) -> None:
        """TrainingArguments' __post_init__, which for torch_compile would turn on TF32, and accelerate's compiler."""
        asked = {name: getattr(self, name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode")}
        for name in asked:
            setattr(self, name, None)
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError(
                "deepspeed: expected its package, and it is not installed: pip install deepspeed; FSDP2 needs "
                "none: fsdp=True, fsdp_config={'version': 2}"
            )
        super().__post_init__()
        if asked["torch_compile"] is None and any(asked.values()):
            asked["torch_compile"] = True
        for name, value in asked.items():
            setattr(self, name, value)

    def _check_max_tokens(self) -> None:
        if isinstance(self.max_tokens, str) and self.max_tokens.isdecimal():
            self.max_tokens = int(self.max_tokens)  # from a command line
        wrong = isinstance(self.max_tokens, str) and self.max_tokens != "auto"
        if wrong or (isinstance(self.max_tokens, int) and self.max_tokens < 1):
            raise ValueError(f"max_tokens: expected at least 1, or 'auto', got {self.max_tokens!r}")

    def _check_moving_reference(self) -> None:
        if not self.sync_ref_model:
            return
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha: expected in (0, 1], got {self.ref_model_mixup_alpha}")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps: expected at least 1, got {self.ref_model_sync_steps}")
        if self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model: a reference that moves cannot be computed before training; "
                "set precompute_ref_log_probs to False"
            )
        if not self.preference_loss().needs_reference:
            raise ValueError(f"sync_ref_model: loss_type {self.loss_type} has no reference")

    def preference_loss(self) -> PreferenceLoss:
        """Returns the loss that these arguments describe; ValueError where an option is not one of that loss."""
        kinds = tuple(self.loss_type)
        weights = None if self.loss_weights is None else tuple(self.loss_weights)
        shared = {f.name for f in fields(PreferenceLoss) if f.init} - {"kind", "weights"}
        options = {name: getattr(self, name) for name in shared}
        return PreferenceLoss(kind=kinds[0] if len(kinds) == 1 else kinds, weights=weights, **options)


def _chooses_bf16(args: DPOConfig) -> bool:
    """Whether the GPU multiplies in bfloat16 and nothing else has decided about mixed precision."""
    decided = args.fp16 or args.deepspeed or "ACCELERATE_MIXED_PRECISION" in os.environ
    if decided or args.use_cpu or not torch.cuda.is_available():
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)
