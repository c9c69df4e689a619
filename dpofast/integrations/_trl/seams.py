"""Which names of trl's DPOTrainer are replaced in each version: find_seam chooses them, and Patch replaces them.

| seam                 | trl          | what is replaced in trl.trainer.dpo_trainer                                 |
|----------------------|--------------|-----------------------------------------------------------------------------|
| fused_lm_head        | 1.15 and on  | add_fused_lm_head                                                           |
| compute_loss         | 0.29 to 1.14 | DPOTrainer._compute_loss, compute_ref_log_probs: models called inside them  |
|                      |              | return ScoredLogits (logits.py); the functions that read log-probs          |
| concatenated_forward | 0.19 to 0.28 | DPOTrainer.concatenated_forward, the same way                               |

From 0.29 on the rows travel from the collator to the model: DataCollatorForPreference, and the one for images, make a
RowsBatch of trl's keys, DPOTrainer._prepare_inputs keeps it one, and _compute_loss and compute_ref_log_probs give the
rows to the model.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast.head.options import STATS
from dpofast.integrations._trl.forward import SCORING, FusedForward, Scoring, fuse
from dpofast.integrations._trl.images import reader_of, refusal
from dpofast.integrations._trl.logits import ScoredLogits
from dpofast.integrations._trl.rows import ROWS_KEY
from dpofast.integrations._trl.scores import NOISE, FusedOptions
from dpofast.model.parts import base_causal_lm

TRAINER = "trl.trainer.dpo_trainer"
_HEAD_PARAMETERS = {"model", "temperature", "cast_lm_head_to_fp32", "outputs"}
_OUTPUT_FIELDS = {"loss", "log_probs", *STATS, "label_mask", "aux_loss"}
# The functions of trl that turn logits into per-token values, and what replaces them for ScoredLogits.
_READERS: dict[str, Callable[..., Any]] = {
    "selective_log_softmax": lambda logits, index, *_, **__: logits.log_softmax_at(index),
    "entropy_from_logits": lambda logits, *_, **__: logits.entropy(),
    "selective_log_softmax_and_entropy": lambda logits, index, *_, **__: (
        logits.log_softmax_at(index),
        logits.entropy(),
    ),
}


class Replaced(NamedTuple):
    """A name that was replaced, and what it was: _INHERITED where the owner had none of its own."""

    owner: Any
    name: str
    value: Any


_INHERITED = object()


@dataclass
class Patch:
    """A patch in place: where, with which options, what it replaced, and what has run through it.

    Attributes:
        seam: a name from the table above.
        level, on_unpackable, max_logits_bytes: as in patch_trl.
        calls: how many forwards ran packed, how many padded and why.
        models: a line for each fused model: its name, and packed or why padded.
        replaced: in order of replacement.
    """

    seam: str
    level: str
    on_unpackable: str
    max_logits_bytes: int | None
    calls: Counter[str] = field(default_factory=Counter)
    models: list[str] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set owner.name, and remember what it was."""
        self.replaced.append(Replaced(owner, name, owner.__dict__.get(name, _INHERITED)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restore all that was replaced."""
        for owner, name, value in reversed(self.replaced):
            if value is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def fuse(self, model: Any, **options: Any) -> None:
        """Fuse a model with the patch's options and these, and note whether it runs packed or padded."""
        name = type(model).__name__
        shared = FusedOptions(
            self.level, self.on_unpackable, max_logits_bytes=self.max_logits_bytes, calls=self.calls, **options
        )
        reason = fuse(model, shared)
        line = f"{name}: packed" if reason is None else f"{name}: padded, because {reason}"
        of_images = refusal(model) if reason is None else None
        self.models.append(line if of_images is None else f"{line}; batches with images padded, because {of_images}")


def trl_version() -> str:
    """The installed version of trl, for messages."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


class Seam(NamedTuple):
    """A place to patch trl: its name in the table above, and install(module, patch), which replaces names there."""

    name: str
    install: Callable[[Any, Patch], None]


def find_seam(module: Any) -> Seam:
    """Find the seam of the installed trl by the names in its trainer's module, not by its version.

    Raises:
        ValueError: no known one; the message names what was looked for and what is there.
    """
    trainer = getattr(module, "DPOTrainer", None)
    if hasattr(module, "add_fused_lm_head"):
        _check_fused_head(module)
        return Seam("fused_lm_head", _install_fused_head)
    for name, parameters, install in (
        ("_compute_loss", ["self", "model", "inputs", "return_outputs"], _install_compute_loss),
        ("concatenated_forward", ["self", "model", "batch", "is_ref_model"], _install_concatenated_forward),
    ):
        method = getattr(trainer, name, None)
        if method is not None and list(inspect.signature(method).parameters) == parameters:
            if hasattr(module, "selective_log_softmax"):
                return Seam(name.removeprefix("_"), install)
    methods = sorted(name for name in vars(trainer or object) if "loss" in name or "forward" in name)
    raise ValueError(
        f"trl {trl_version()}: {TRAINER} has none of the seams that dpofast knows (add_fused_lm_head, "
        f"DPOTrainer._compute_loss, DPOTrainer.concatenated_forward); its DPOTrainer has {methods}. Use a trl that "
        "dpofast supports, or dpofast.DPOTrainer"
    )


# ---- trl 1.15 and on ------------------------------------------------------------------------------------------------


def _check_fused_head(module: Any) -> None:
    from trl.trainer.utils import FusedCausalLMOutput

    parameters = set(inspect.signature(module.add_fused_lm_head).parameters)
    outputs = {output.name for output in fields(FusedCausalLMOutput)}
    unknown = (parameters ^ _HEAD_PARAMETERS) | (outputs ^ _OUTPUT_FIELDS)
    if unknown:
        raise ValueError(
            f"trl {trl_version()}: its add_fused_lm_head and FusedCausalLMOutput differ from those that dpofast knows "
            f"in {sorted(unknown)}: use a trl that dpofast supports, or dpofast.DPOTrainer"
        )


def _install_fused_head(module: Any, patch: Patch) -> None:
    trainer_class = module.DPOTrainer
    construct, compute_loss = trainer_class.__init__, trainer_class._compute_loss
    compute_reference = trainer_class.compute_ref_log_probs

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        """trl's function of this name, on dpofast's engine."""
        unknown = set(outputs) - {"log_probs", *STATS}
        if unknown or cast_lm_head_to_fp32:
            raise ValueError(
                f"add_fused_lm_head under patch_trl(): expected outputs among {['log_probs', *STATS]} and no "
                f"cast_lm_head_to_fp32 (logits are float32 anyway), got {sorted(unknown) or 'cast_lm_head_to_fp32'}"
            )
        patch.fuse(model, temperature=temperature, stats=tuple(name for name in outputs if name != "log_probs"))

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_noise(patch, construct, self, *args, **kwargs)
        construct(self, *args, **kwargs)

    @functools.wraps(compute_loss)
    def loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
        return compute_loss(self, model, _model_inputs(inputs), return_outputs)

    @functools.wraps(compute_reference)
    def reference(self: Any, model: Any, inputs: Any) -> Any:
        return compute_reference(self, model, _model_inputs(inputs))

    patch.replace(module, "add_fused_lm_head", add_fused_lm_head)
    patch.replace(trainer_class, "__init__", constructed)
    patch.replace(trainer_class, "_compute_loss", loss)
    patch.replace(trainer_class, "compute_ref_log_probs", reference)
    _install_rows(module, patch)


def _model_inputs(inputs: Any) -> Any:
    """trl's batch, with the model's argument for the rows where they are known."""
    rows = getattr(inputs, "rows", None)
    return inputs if rows is None else {**inputs, ROWS_KEY: rows}


def _install_rows(module: Any, patch: Patch) -> None:
    """Read the padded rows in the collator, and keep them with the batch as it becomes the model's inputs."""
    from dpofast.integrations._trl.collator import RowsBatch, RowsCollator, VisionRowsCollator

    construct, prepare = module.DPOTrainer.__init__, module.DPOTrainer._prepare_inputs

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if isinstance(self.data_collator, VisionRowsCollator):
            self.data_collator.inputs = reader_of(self.accelerator.unwrap_model(self.model))

    @functools.wraps(prepare)
    def prepared(self: Any, inputs: Any) -> Any:
        rows = getattr(inputs, "rows", None)
        outputs = prepare(self, inputs)
        return outputs if rows is None else RowsBatch(outputs, rows)

    patch.replace(module, "DataCollatorForPreference", RowsCollator)
    patch.replace(module, "DataCollatorForVisionPreference", VisionRowsCollator)
    patch.replace(module.DPOTrainer, "__init__", constructed)
    patch.replace(module.DPOTrainer, "_prepare_inputs", prepared)


def _check_noise(patch: Patch, construct: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Refuse NEFTune where the first step would, before any reference pass; construct is DPOTrainer's constructor."""
    config = inspect.signature(construct).bind(*args, **kwargs).arguments.get("args")
    noise = getattr(config, "neftune_noise_alpha", None) is not None
    if noise and patch.level == "forward" and patch.on_unpackable == "raise":
        FusedOptions(patch.level, patch.on_unpackable).run_padded("DPOTrainer(neftune_noise_alpha=...)", NOISE)


# ---- trl before 1.15 ------------------------------------------------------------------------------------------------


def _install_compute_loss(module: Any, patch: Patch) -> None:
    trainer_class = module.DPOTrainer
    compute_loss, compute_reference = trainer_class._compute_loss, trainer_class.compute_ref_log_probs
    stats = ("entropy", "mean_logits", "is_top1")

    @contextmanager
    def scored(trainer: Any, inputs: dict[str, Any]) -> Iterator[None]:
        mask = inputs["completion_mask"]
        if hasattr(trainer, "_truncate_inputs"):  # 0.29 truncates on the device, after the collator
            *_, mask = trainer._truncate_inputs(inputs["input_ids"], inputs["attention_mask"], mask)
        with _scoring(trainer, patch, stats, lambda *_: mask != 0, getattr(inputs, "rows", None)):
            yield

    @functools.wraps(compute_loss)
    def scored_loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if return_outputs:  # the caller wants logits
            return compute_loss(self, model, inputs, return_outputs)
        with scored(self, inputs):
            return compute_loss(self, model, inputs, return_outputs)

    @functools.wraps(compute_reference)
    def scored_reference(self: Any, *arguments: Any) -> Any:
        with scored(self, arguments[-1]):
            return compute_reference(self, *arguments)

    patch.replace(trainer_class, "_compute_loss", scored_loss)
    patch.replace(trainer_class, "compute_ref_log_probs", scored_reference)
    _install_readers(module, patch, stats)
    _install_rows(module, patch)


def _install_concatenated_forward(module: Any, patch: Patch) -> None:
    trainer_class = module.DPOTrainer
    forward = trainer_class.concatenated_forward
    # trl takes the mean of the reference's logits too
    always = ("mean_logits",)

    @functools.wraps(forward)
    def scored_forward(self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> Any:
        if getattr(self, "padding_free", False):
            raise ValueError("patch_trl(): expected padding_free=False, got True: no pad token is computed anyway")
        prompts = batch["prompt_attention_mask"].sum(1).repeat(2)
        responses = torch.cat([batch[f"{which}_attention_mask"].sum(1) for which in ("chosen", "rejected")])

        def labelled(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            first = prompts if self.truncation_mode == "keep_start" else mask.sum(1) - responses
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            return (columns >= first[:, None]) & (mask != 0)

        # trl computes a weight for the reference as well
        weights = ("log_sum_sq_probs",) if self.use_weighting else ()
        with _scoring(self, patch, (), labelled, None, always + weights):
            return forward(self, model, batch, is_ref_model)

    patch.replace(trainer_class, "concatenated_forward", scored_forward)
    _install_readers(module, patch, ())


def _install_readers(module: Any, patch: Patch, stats: tuple[str, ...]) -> None:
    """Replace the functions that read logits, and fuse models before accelerate wraps their forward."""
    trainer_class = module.DPOTrainer
    construct = trainer_class.__init__

    def reader(name: str) -> Callable[..., Any]:
        plain = getattr(module, name)

        @functools.wraps(plain)
        def read(logits: Any, *args: Any, **kwargs: Any) -> Any:
            known = isinstance(logits, ScoredLogits)
            return _READERS[name](logits, *args, **kwargs) if known else plain(logits, *args, **kwargs)

        return read

    for name in _READERS:
        if hasattr(module, name):
            patch.replace(module, name, reader(name))

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_noise(patch, construct, self, *args, **kwargs)
        with _fused_when_prepared(patch):
            construct(self, *args, **kwargs)
        if getattr(self, "use_liger_kernel", False) or getattr(self.args, "use_liger_loss", False):
            raise ValueError("patch_trl(): expected a trainer without Liger's loss: the two replace the same thing")
        _fuse_models(self, patch, stats)

    patch.replace(trainer_class, "__init__", constructed)


@contextmanager
def _scoring(
    trainer: Any,
    patch: Patch,
    stats: tuple[str, ...],
    labelled: Callable[[Tensor, Tensor | None], Tensor],
    rows: Any,
    always: tuple[str, ...] = (),
) -> Iterator[None]:
    _fuse_models(trainer, patch, stats)
    policy = base_causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    token = SCORING.set(Scoring(labelled, policy, rows, always))
    try:
        yield
    finally:
        SCORING.reset(token)


def _fuse_models(trainer: Any, patch: Patch, stats: tuple[str, ...]) -> None:
    """Fuse the policy and the reference, unless this patch has done so already."""
    weights = ("log_sum_sq_probs",) if stats and trainer.use_weighting else ()
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            base = base_causal_lm(trainer.accelerator.unwrap_model(model))
            if not isinstance(base, FusedForward) or base._dpofast_fused.calls is not patch.calls:
                patch.fuse(base, stats=stats + weights if model is trainer.model else ())


@contextmanager
def _fused_when_prepared(patch: Patch) -> Iterator[None]:
    """Fuse models before accelerate prepares them: under mixed precision it binds the forward that they have then."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare_model

    def prepare_fused(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        patch.fuse(base_causal_lm(model))
        return prepare(self, model, *args, **kwargs)

    Accelerator.prepare_model = prepare_fused
    try:
        yield
    finally:
        Accelerator.prepare_model = prepare
