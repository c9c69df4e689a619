"""DPOTrainer: transformers' Trainer with a batch-exact preference step.

A step takes the same pairs, in the sampler's order, as a trainer that pads them would, packs them into micro-batches
of at most max_tokens positions, and divides by the number of pairs of the whole step. So the result depends neither on
max_tokens nor on how many micro-batches there are: pairs per step is a hyperparameter, max_tokens a property of the
machine.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from dpofast.config import DPOConfig
from dpofast.coupled import RunningRewards, step_outputs
from dpofast.data import tokenize_preferences
from dpofast.formats import ID_COLUMNS, REF_COLUMNS
from dpofast.head import HeadPlan
from dpofast.metrics import TOKEN_STATISTICS, MetricSums, work_avoided
from dpofast.model import PackedPreference, attach_logprob_head
from dpofast.packing import PackedBatch, pack
from dpofast.pair_terms import StepTotals, Tokens
from dpofast.preference import PreferenceOutput, token_preference_loss
from dpofast.refcache import add_reference_columns, reference_logps

# Large enough for full GEMM speed; on a CPU a pass without gradients is fastest where its activations stay in cache.
_MAX_TOKENS_GPU, _MAX_TOKENS_CPU, _FORWARD_TOKENS_CPU = 16384, 2048, 1024


class DPOTrainer(Trainer):
    """Direct Preference Optimization (arXiv 2305.18290) on packed batches.

    Args:
        model: a causal language model, a PEFT model, or a name or folder that AutoModelForCausalLM loads (in float32).
        ref_model: the reference; None means the model as it is now (under PEFT, its base model).
        args: a DPOConfig.
        train_dataset: preference pairs in any of the formats of dpofast.tokenize_preferences.
        eval_dataset: the same, held out; a dict of them is evaluated one by one, each under its name.
        processing_class: the tokenizer; None loads the one that lies beside the model.
        peft_config: wraps the model by peft.get_peft_model.
        callbacks: further TrainerCallbacks.
        optimizers: an optimizer and a scheduler of your own.

    Raises:
        ValueError: a model that cannot run packed (nor, with padded=True, over padded rows), data that cannot be used
            (DataError, with its row), an argument out of range, several processes.
    """

    train_dataset: Any
    eval_dataset: Any
    control: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        """Tokenize, attach the log-prob head, and compute the reference log-probs unless told to do so in the step."""
        args = DPOConfig(output_dir="dpofast-output") if args is None else copy.copy(args)
        _check_topology(args)
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model: expected another model than `model`, or None for the model as it is now")
        self.loss = args.preference_loss()
        if ref_model is not None and not self.loss.needs_reference:
            raise ValueError(f"ref_model: loss_type {self.loss.kind!r} has no reference; leave it out")
        # The loop below makes the micro-batches, so Trainer sees one batch a step.
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        args.dataloader_pin_memory = False  # batches are numpy arrays until they are packed
        torch.manual_seed(args.seed)
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None and model.config.name_or_path:  # token ids need none
            processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            _disable_dropout(model, ref_model)
        attach_logprob_head(model, padded=args.padded)
        if ref_model is not None:
            attach_logprob_head(ref_model, padded=args.padded)

        vocab = model.get_input_embeddings().weight.shape[0]
        if ref_model is not None and ref_model.get_input_embeddings().weight.shape[0] != vocab:
            theirs = ref_model.get_input_embeddings().weight.shape[0]
            raise ValueError(f"ref_model: expected the model's vocabulary of {vocab} tokens, got {theirs}")
        head = model.get_output_embeddings().weight
        if args.max_logits_bytes is not None:  # refused here and not in the first step
            HeadPlan.make(1, head, args.max_logits_bytes, keep=True)
        self.data_reports: dict[str, Any] = {}
        self._tokenize_options = {
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "on_bad_row": args.on_bad_row,
            "num_proc": args.dataset_num_proc,
            "vocab_size": vocab,
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=None if train_dataset is None else self._tokenized(train_dataset, "train"),
            eval_dataset=_each(self._tokenized, eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.loss.bco_delta == "running_mean":
            self.add_callback(RunningRewards())
            self.args.restore_callback_states_from_checkpoint = True
        if self.train_dataset is not None:
            pairs, step = len(self.train_dataset), args.per_device_train_batch_size
            if args.dataloader_drop_last and pairs < step:
                raise ValueError(
                    f"dataloader_drop_last: {pairs} pairs are fewer than the {step} of a step, so nothing would be "
                    "trained: leave it off, or set a smaller per_device_train_batch_size"
                )
        on_cpu = args.device.type == "cpu"
        self.max_tokens = args.max_tokens or (_MAX_TOKENS_CPU if on_cpu else _MAX_TOKENS_GPU)
        self.max_forward_tokens = min(self.max_tokens, _FORWARD_TOKENS_CPU) if on_cpu else self.max_tokens
        # padded rows repeat the prompt, so max_tokens counts it for each of them
        self.share_prompts = args.share_prompts and not args.padded
        self.ref_model = self._reference_model(ref_model)
        self._window = _LogWindow()
        if args.precompute_ref_log_probs and self.loss.needs_reference:
            if self.train_dataset is not None:
                self.train_dataset = self._with_reference(self.train_dataset, "train")
            self.eval_dataset = _each(self._with_reference, self.eval_dataset)
            self.ref_model = None

    # ---- data -------------------------------------------------------------------------------------------------------

    def _tokenized(self, dataset: Dataset, name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name}_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
        source = dataset.info.dataset_name or f"{name} data"
        tokens, self.data_reports[name] = tokenize_preferences(dataset, source=source, **self._tokenize_options)
        return tokens.with_format("numpy")

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*ID_COLUMNS, *REF_COLUMNS, "row"]

    def _packed(self, examples: Sequence[dict[str, Any]], max_tokens: int) -> list[PackedBatch]:
        weighted = self.loss.ld_alpha is not None and REF_COLUMNS[0] in examples[0]
        columns = []
        if weighted:  # a branch's number differs from pair to pair, which a packed batch has no place for
            columns = [[float(example[name]) for name in REF_COLUMNS] for example in examples]
            examples = [{name: example[name] for name in ID_COLUMNS} for example in examples]
        batches = pack(examples, max_tokens, share_prompts=self.share_prompts)
        if weighted:
            by_pair = torch.tensor(columns, dtype=torch.float32)
            batches = [replace(batch, ref_logps=by_pair[batch.pair_examples]) for batch in batches]
        return [batch.to(self.args.device) for batch in batches]

    # ---- reference --------------------------------------------------------------------------------------------------

    def _reference_model(self, ref_model: Any) -> Any:
        """The model that gives reference log-probs, or None where the trained model itself does (adapters off)."""
        live = self.loss.needs_reference and not self.args.precompute_ref_log_probs
        if ref_model is None and live and not _is_peft(self.model):
            ref_model = copy.deepcopy(self.model)
        if ref_model is not None:
            ref_model.requires_grad_(False).eval().to(self.args.device)
        return ref_model

    @contextlib.contextmanager
    def _reference(self) -> Any:
        """Yield the reference model: a model of its own, or the trained one without its adapter."""
        if self.ref_model is not None:
            yield self.ref_model
        elif _is_peft(self.model):
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield self.model
        else:
            yield self.model  # before training: the policy is its own reference

    def _with_reference(self, dataset: Dataset, name: str) -> Dataset:
        if set(REF_COLUMNS) <= set(dataset.column_names):
            return dataset
        if self.ref_model is None and not _is_peft(self.model) and self.state.global_step > 0:
            raise ValueError(
                f"{name}_dataset: its reference log-probs need the reference model, which is gone once training has "
                "begun with precompute_ref_log_probs=True: pass this dataset to the constructor, or set it to False"
            )
        bar = tqdm(total=len(dataset), desc=f"reference log-probs, {name}", disable=self.args.disable_tqdm, leave=False)
        with bar, self._reference() as model:
            return add_reference_columns(
                dataset,
                model,
                max_tokens=self.max_forward_tokens,
                share_prompts=self.share_prompts,
                max_logits_bytes=self.args.max_logits_bytes,
                ld_alpha=self.loss.ld_alpha,
                device=self.args.device,
                autocast=self.accelerator.autocast,
                progress=bar.update,
            )

    def _reference_logps(self, batch: PackedBatch) -> Tensor | None:
        """(S,), with ld_alpha (P, 2), or None where the loss has no reference and the data brought none."""
        if batch.ref_logps is not None or not self.loss.needs_reference:
            return batch.ref_logps
        if self.args.precompute_ref_log_probs:
            raise ValueError(
                f"expected the columns {REF_COLUMNS} that the reference log-probs were written to, and the "
                "batch has none: pass the dataset to DPOTrainer's constructor"
            )
        with self._reference() as model:
            training = model.training
            model.eval()
            try:
                return reference_logps(model, batch, self.args.max_logits_bytes, self.loss.ld_alpha)
            finally:
                model.train(training)

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _totals(self, examples: Sequence[dict[str, Any]]) -> StepTotals:
        chosen_tokens = sum(len(example["chosen_ids"]) for example in examples)
        running = self._running_rewards
        earlier = None if running is None else running.tensor(self.args.device)
        return StepTotals(len(examples), chosen_tokens, earlier)

    @property
    def _running_rewards(self) -> RunningRewards | None:
        # looked up anew: resuming puts another object in its place
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, RunningRewards))
        return next(found, None)

    def _outputs(
        self, model: nn.Module, batches: list[PackedBatch], totals: StepTotals, sums: MetricSums
    ) -> Iterator[PreferenceOutput]:
        """The loss of each batch, its share of the step's; per-token statistics cost a path that keeps more."""
        plan = self._coupled if self.loss.coupled and len(batches) > 1 else self._separable
        for batch, output in zip(batches, plan(model, batches, totals, sums), strict=True):
            with_reference = batch.ref_logps is not None or self.loss.needs_reference
            sums.add_pairs(output, batch, self.loss.beta, with_reference=with_reference)
            yield output

    def _tokens(self, model: nn.Module, batch: PackedBatch, sums: MetricSums) -> Tokens:
        """Log-probs and statistics per token."""
        stats: tuple[str, ...] = TOKEN_STATISTICS if self.args.token_statistics else ()
        stats += ("log_sum_sq_probs",) if self.loss.use_weighting else ()
        output = model(packed=batch, stats=stats, max_logits_bytes=self.args.max_logits_bytes)
        if self.args.token_statistics:
            sums.add_tokens(output, batch)
        return Tokens(output.logps, batch.cu_targets, None, output.log_sum_sq_probs)

    def _separable(
        self, model: nn.Module, batches: list[PackedBatch], totals: StepTotals, sums: MetricSums
    ) -> Iterator[PreferenceOutput]:
        step = {name: getattr(totals, name) for name in ("num_pairs", "num_chosen_tokens", "earlier_rewards")}
        for batch in batches:
            # accelerate puts only the prepared policy under autocast, and the reference must take the same path
            with self.accelerator.autocast():
                ref_logps = self._reference_logps(batch)
                if self.args.token_statistics:
                    tokens = self._tokens(model, batch, sums)
                    output = token_preference_loss(
                        tokens.logps,
                        batch.cu_targets,
                        batch.pairs,
                        ref_logps,
                        loss=self.loss,
                        log_sum_sq_probs=tokens.log_sum_sq,
                        **step,
                    )
                else:
                    preference = PackedPreference(ref_logps, self.loss, **step)
                    budget = self.args.max_logits_bytes
                    output = model(packed=batch, preference=preference, max_logits_bytes=budget)
            yield output

    def _coupled(
        self, model: nn.Module, batches: list[PackedBatch], totals: StepTotals, sums: MetricSums
    ) -> Iterator[PreferenceOutput]:
        """A loss that couples several micro-batches: all their log-probs first, then each one's gradient."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # Both passes over a micro-batch draw the same dropout.
        with torch.random.fork_rng(devices), torch.no_grad(), self.accelerator.autocast():
            tokens = [self._tokens(model, batch, sums) for batch in batches]
            references = [self._reference_logps(batch) for batch in batches]
        pairs = [batch.pairs for batch in batches]
        for batch, (output, coefficients) in zip(
            batches, step_outputs(tokens, pairs, references, self.loss, totals), strict=True
        ):
            if torch.is_grad_enabled():
                with self.accelerator.autocast():
                    logps = model(packed=batch, max_logits_bytes=self.args.max_logits_bytes).logps
                output = replace(output, loss=(logps * coefficients).sum())
            yield output

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one optimizer step's pairs, micro-batch by micro-batch. Returns the mean loss."""
        start = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batches = self._packed(inputs, self.max_tokens)
        losses = []
        outputs = self._outputs(model, batches, self._totals(inputs), self._window.sums)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                output = next(outputs)
                self.accelerator.backward(output.loss)
            losses.append(output.losses)
            if self._running_rewards is not None:
                self._running_rewards.add(output.of_pairs("rewards", batch.pairs))
        loss = torch.cat(losses).sum() / len(inputs)
        if not math.isfinite(loss.item()):
            self._raise_not_finite(inputs, batches, losses)
        self._window.add_step(work_avoided(inputs, batches), batches, time.perf_counter() - start)
        return loss

    def _raise_not_finite(self, examples: Any, batches: list[PackedBatch], losses: list[Tensor]) -> None:
        rows = [
            int(examples[int(example)]["row"])
            for batch, pair_losses in zip(batches, losses, strict=True)
            for example, value in zip(batch.pair_examples, pair_losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        report = self.data_reports["train"]
        raise FloatingPointError(
            f"{report.source}: the loss of the pairs in {report.unit}s {sorted(rows)} is not finite at step "
            f"{self.state.global_step + 1}, which was not taken. Look at these pairs, and at a learning rate that is "
            "too high; checkpoints of earlier steps can be resumed"
        )

    def floating_point_ops(self, inputs: Any) -> float:
        """6·parameters·positions of the last step, head and trunk apart; Trainer adds it up as total_flos."""
        head = self.model.get_output_embeddings().weight.numel()
        trunk = sum(p.numel() for p in self.model.parameters()) - self.model.get_input_embeddings().weight.numel()
        if self.model.get_input_embeddings().weight is not self.model.get_output_embeddings().weight:
            trunk -= head
        return 6.0 * (trunk * self._window.last_tokens + head * self._window.last_targets)

    # ---- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on the constructor's eval_dataset, or on further preference data in any format."""
        if isinstance(eval_dataset, (Dataset, dict)):
            eval_dataset = _each(self._prepared, eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepared(self, dataset: Dataset, name: str) -> Dataset:
        """Tokens and reference log-probs of further data; what the constructor prepared passes as it is."""
        if "row" in dataset.column_names:
            return dataset
        tokens = self._tokenized(dataset, name)
        precompute = self.args.precompute_ref_log_probs and self.loss.needs_reference
        return self._with_reference(tokens, name) if precompute else tokens

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics over a dataset, means over its pairs."""
        model = self._wrap_model(self.model, training=False)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = MetricSums()
        count = 0
        for examples in dataloader:
            batches = self._packed(examples, self.max_forward_tokens)
            for output in self._outputs(model, batches, self._totals(examples), sums):
                sums.add("loss", output.losses.sum(), len(output.losses))
            count += len(examples)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in sums.means().items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a training log."""
        if "loss" in logs:
            logs = {**logs, **self._window.read(), "truncated": self.data_reports["train"].truncated}
        super().log(logs, start_time)


class _LogWindow:
    """Metrics between two logs."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._restart()

    def _restart(self) -> None:
        self.sums = MetricSums()
        self._avoided: list[dict[str, float]] = []
        self._tokens, self._seconds = 0, 0.0

    def add_step(self, avoided: dict[str, float], batches: list[PackedBatch], seconds: float) -> None:
        self.last_tokens = sum(batch.num_tokens for batch in batches)
        self.last_targets = sum(batch.num_targets for batch in batches)
        self.num_tokens += self.last_tokens
        self._tokens += self.last_tokens
        self._seconds += seconds
        self._avoided.append(avoided)

    def read(self) -> dict[str, float]:
        """The means since the last read; num_tokens counts from the start."""
        metrics = self.sums.means()
        for name in self._avoided[0] if self._avoided else ():
            metrics[name] = sum(step[name] for step in self._avoided) / len(self._avoided)
        metrics["num_tokens"] = self.num_tokens
        metrics["tokens_per_second"] = self._tokens / self._seconds if self._seconds else 0.0
        self._restart()
        return metrics


def _each(prepare: Callable[[Dataset, str], Dataset], dataset: Any) -> Any:
    """Prepare the eval dataset, or each of several."""
    if isinstance(dataset, dict):
        return {name: prepare(part, f"eval {name}") for name, part in dataset.items()}
    return None if dataset is None else prepare(dataset, "eval")


def _check_topology(args: DPOConfig) -> None:
    if not isinstance(args, DPOConfig):
        raise ValueError(f"args: expected a DPOConfig, got {type(args).__name__}")
    if args.world_size > 1:
        raise ValueError(f"DPOTrainer runs in one process, and {args.world_size} were launched")
    if args.n_gpu > 1:
        raise ValueError(f"DPOTrainer uses one GPU, and {args.n_gpu} are visible: set CUDA_VISIBLE_DEVICES")


def _disable_dropout(*models: Any) -> None:
    for model in models:
        for module in model.modules() if model is not None else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            # transformers hands this number to its attention functions
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0


def _is_peft(model: Any) -> bool:
    return hasattr(model, "disable_adapter")
