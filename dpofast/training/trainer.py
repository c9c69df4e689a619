"""DPOTrainer: transformers' Trainer with a batch-exact preference step.

A step takes the same pairs, in the sampler's order, as a trainer that pads them would, divides them among the ranks,
packs each share into micro-batches of at most max_tokens positions, and divides by the number of pairs of the whole
step. So the result depends neither on max_tokens nor on how many micro-batches and ranks there are: pairs per step is a
hyperparameter, max_tokens a property of the machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from dpofast.checkpointing.identity import reference_identity
from dpofast.common.ranks import Ranks
from dpofast.data.arrow import mapped_files, release_pages
from dpofast.data.images.columns import OF_IMAGES
from dpofast.data.token_rows import DECIDING_COLUMNS, has_reference, optional_columns
from dpofast.evaluation.metrics import MetricSums, check_best_metric
from dpofast.evaluation.pair_records import PairRecords
from dpofast.losses.pairs import StepTotals
from dpofast.model.adapters import check_trainable
from dpofast.model.neftune import noisy_embeddings
from dpofast.packing.arguments import sharing
from dpofast.packing.batch import PackedBatch
from dpofast.scoring.score import Forward
from dpofast.training.checks.arguments import check_arguments
from dpofast.training.checks.columns import check_data_columns
from dpofast.training.checks.device import check_kernels, device_notes, print_notes
from dpofast.training.checks.launch import check_options_of_sharded, check_pairs, check_reference_used, own_arguments
from dpofast.training.checks.methods import check_methods
from dpofast.training.coupled import RunningRewards
from dpofast.training.data.micro_batches import StepPacker
from dpofast.training.data.tokens import PreferenceData, each_eval_dataset
from dpofast.training.evaluate import evaluate_pairs
from dpofast.training.loaders import StepLoaders
from dpofast.training.log_window import LogWindow, merged_windows, step_flops
from dpofast.training.memory.fit import auto_max_tokens, run_until_it_fits
from dpofast.training.memory.out_of_memory import halved_max_tokens, token_limits
from dpofast.training.model_card import model_card_of
from dpofast.training.parallel.fsdp import forward_dtype, is_sharded
from dpofast.training.parallel.offload import offloaded_activations
from dpofast.training.parallel.sequence import sequence_group
from dpofast.training.parallel.tensor import synchronize_replicas
from dpofast.training.prepare import check_where_it_runs, kept_use_cache, prepare_models, vocabulary
from dpofast.training.ref_model import (
    MOVING_OPTIONS,
    MovingReference,
    ReferenceModel,
    make_reference,
    reference_is_gone,
    with_reference_columns,
)
from dpofast.training.sampler import StepExamples, StepLoader
from dpofast.training.step import OptimizerStep, not_finite, rows_not_finite, step_settings

_REFERENCE_FILE = "moving_reference.safetensors"  # in a checkpoint


class DPOTrainer(StepLoaders):
    """Direct Preference Optimization (arXiv 2305.18290) on packed batches, of pairs or of lists of responses.

    Args:
        model: a causal language model, a PEFT model, or a name or folder that AutoModelForCausalLM loads (in float32);
            for tensor_parallel_size a name, or a model that from_pretrained(distributed_config=...) has divided.
        ref_model: the reference, a model or its name; None means the model as it is now (with peft_config its base
            model).
        args: a DPOConfig, or TRL's.
        data_collator: None; TRL's argument, refused.
        train_dataset: preference pairs, or lists, in any of the formats of dpofast.tokenize_preferences, with the
            columns of a row (weight, margin, beta ...) that the loss takes. Of an IterableDataset,
            which is read and tokenized as training goes, the reference is computed in the step.
        eval_dataset: the same, held out, read whole; a dict of them is evaluated one by one, each under its name.
        processing_class: the tokenizer, or for images the model's processor; None loads what lies beside the model.
        compute_metrics: None; TRL's argument, refused.
        callbacks: further TrainerCallbacks.
        optimizers: an optimizer and a scheduler of your own.
        quantization_config: for a model given by name.
        peft_config: wraps the model by peft.get_peft_model.

    Attributes:
        loss: the PreferenceLoss that the arguments describe.
        data_reports: the DataReport of every dataset, by its name.
        pair_records: what the last evaluation under each prefix ("eval") saw of every pair.
        max_tokens: packed positions per micro-batch; halved where memory runs out.
        data_ranks: what a step's pairs are divided among; ranks that share a model's work share their pairs.
        share: what sequences of a micro-batch share, "prefix", "prompt" or "none"; with NEFTune not in training.

    Raises:
        ValueError: a model that cannot run packed (nor, with padded=True, over padded rows), data that cannot be used
            (DataError, with its row), an argument out of range, several GPUs in one process.
    """

    identity_columns = (*DECIDING_COLUMNS, *OF_IMAGES)

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: Any = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        """Prepare models, data, reference and step; compute reference log-probs unless told to do so in the step."""
        check_methods(type(self), DPOTrainer)
        check_arguments(data_collator, compute_metrics, processing_class, peft_config)
        args = own_arguments(args, train_dataset)
        check_kernels(args.device)
        self.loss = args.preference_loss()
        check_data_columns(args, self.loss, train_dataset, eval_dataset)
        torch.manual_seed(args.seed)
        models = prepare_models(
            model, ref_model, args, processing_class, peft_config, quantization_config, train_dataset
        )
        ref_model = models.ref_model
        if train_dataset is not None:
            check_trainable(models.policy)
        self._data = PreferenceData(args, models.processing, vocabulary(models.policy))
        self.data_reports = self._data.reports
        self.pair_records: dict[str, PairRecords] = {}
        if optimizers[0] is None:
            self.get_optimizer_cls_and_kwargs(args, models.policy)  # raises where its package is not installed
        with kept_use_cache(models.policy):
            super().__init__(
                model=models.policy,
                args=args,
                data_collator=list,
                train_dataset=self._train_tokens(train_dataset),
                eval_dataset=each_eval_dataset(self._data.tokenized, eval_dataset),
                processing_class=models.processing.whole,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        same_data = args.tensor_parallel_size * args.sequence_parallel_size
        self.data_ranks = self.ranks if same_data == 1 else Ranks(same_data)
        # padded rows repeat what packed ones share, so max_tokens counts it for each of them
        self.share = "none" if args.padded else sharing(args.share, args.share_prompts)
        self._group = sequence_group(args)
        self._packer = StepPacker(args.device, self.share, self.loss.ld_alpha is not None, self._group)
        self._training_packer = replace(self._packer, share="none") if args.neftune_noise_alpha else self._packer
        self._check_data_and_launch(ref_model)
        if self.is_world_process_zero():
            print_notes(device_notes(args, models.policy, models.layers, with_images=models.with_images))
        self.neftune_noise_alpha = None  # Trainer's own noise, scaled by the width of a packed row
        self.max_tokens, self.max_forward_tokens = token_limits(
            args.max_tokens, args.device, args.sequence_parallel_size
        )
        self._forward_dtype = forward_dtype(self.accelerator)
        self._reference = make_reference(
            self.model, ref_model, args, self._forward_dtype, wrapped=models.wrapped, sharded=self.shards_early
        )
        self.shard(self._reference.model)
        where: dict[str, Any] = {"with_images": models.with_images, "dtype": self._forward_dtype, "ranks": self.ranks}
        where["group"] = self._group
        for each in filter(None, (self.model, self._reference.model)):
            check_where_it_runs(each, args, self.accelerator.autocast, **where)
        self._reference_identity = self._identity_of_reference(ref_model)  # before training changes the policy
        live = self.loss.needs_reference and not args.precompute_ref_log_probs
        self._settings = step_settings(
            self.model,
            args,
            self.loss,
            self._reference if live else None,
            self.data_ranks,
            self.accelerator,
            self._group,
        )
        self._running_rewards = self._add_callbacks(self._reference)
        self._window = LogWindow(padded=args.padded)
        if args.precompute_ref_log_probs and self.loss.needs_reference:
            if isinstance(self.train_dataset, Dataset):
                self.train_dataset = self._with_reference(self.train_dataset, "train")
            self.eval_dataset = each_eval_dataset(self._with_reference, self.eval_dataset)
            self._reference.release()
        if args.max_tokens == "auto":
            self.max_tokens = auto_max_tokens(
                self.model, self.train_dataset, self._training_packer, self._settings, self._totals, self._data.images
            )

    # ---- what the constructor prepares ------------------------------------------------------------------------------

    def _check_data_and_launch(self, ref_model: Any) -> None:
        check_reference_used(self.args, ref_model, self.train_dataset, self.eval_dataset)
        check_best_metric(self.args, self.loss.needs_reference, self.eval_dataset)
        if isinstance(self.train_dataset, Dataset):
            check_pairs(self.train_dataset, self.args, self.data_ranks, self._training_packer.share)
        if is_sharded(self.accelerator):
            check_options_of_sharded(self.args)

    def _identity_of_reference(self, ref_model: Any) -> dict[str, str]:
        """Fingerprint of the reference's weights, where they decide about the run."""
        in_data = self.train_dataset is not None and has_reference(self.train_dataset.column_names)
        compared = self.loss.needs_reference and not in_data
        return reference_identity(self.model, ref_model) if compared else {}

    def _add_callbacks(self, reference: ReferenceModel) -> RunningRewards | None:
        args = self.args
        if args.sync_ref_model:
            self.add_callback(MovingReference(reference.model, args.ref_model_mixup_alpha, args.ref_model_sync_steps))
        if self.loss.bco_delta != "running_mean":
            return None
        running = RunningRewards(self.data_ranks)
        self.add_callback(running)
        return running

    # ---- data -------------------------------------------------------------------------------------------------------

    def _train_tokens(self, dataset: Any) -> Any:
        if dataset is None or isinstance(dataset, IterableDataset):
            return dataset
        return self._data.tokenized(dataset, "train")

    def get_test_dataloader(self, test_dataset: Any) -> StepLoader:
        """This rank's share of every batch of further data, for predict()."""
        return self.get_eval_dataloader(self._prepared(test_dataset, "test"))

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether a mixture of experts' load-balancing loss is trained."""
        return self._settings.balancing != 0

    # ---- reference --------------------------------------------------------------------------------------------------

    @property
    def ref_model(self) -> Any:
        """The reference, where it is a separate model that is still needed."""
        return self._reference.model

    def _with_reference(self, dataset: Dataset, name: str) -> Dataset:
        if has_reference(dataset.column_names):
            return dataset
        begun = self.state.global_step > 0 and (self._reference.is_policy or self.is_deepspeed_enabled)
        if self._reference.released or begun:
            raise reference_is_gone(name)
        forward = Forward(
            max_tokens=self.max_forward_tokens,
            share=self.share,
            max_logits_bytes=self.args.max_logits_bytes,
            device=self.args.device,
            autocast=self.accelerator.autocast,
            images=self._data.images,
            group=self._group,
        )
        return with_reference_columns(
            dataset,
            name,
            self._reference,
            self.model,
            self.args,
            forward=forward,
            dtype=self._forward_dtype,
            ranks=self.data_ranks,
        )

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def run_identity(self) -> dict[str, Any]:
        """CheckpointedTrainer's, and the options of the loss and the reference."""
        loss = {f.name: getattr(self.loss, f.name) for f in fields(self.loss) if f.init}
        loss["loss_type"], loss["loss_weights"] = loss.pop("kind"), loss.pop("weights")
        own = {"disable_dropout": self.args.disable_dropout, **self._reference_identity}
        moving = {name: getattr(self.args, name) for name in MOVING_OPTIONS if self.args.sync_ref_model}
        columns = optional_columns(getattr(self.train_dataset, "column_names", None))  # the checksum is of values alone
        return {**super().run_identity(), **loss, **own, **moving, **({"columns": columns} if columns else {})}

    def progress_state(self) -> dict[str, Any]:
        """Metrics since the last log and tokens since the first step."""
        return self._window.state_dict()

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by progress_state()."""
        self._window.load_state_dict(state)

    def merged_progress(self, states: list[dict[str, Any]], first: bool) -> dict[str, Any]:
        """One state of all ranks', for another number of ranks."""
        return merged_windows(states, first)

    def save_more(self, folder: str) -> None:
        """Write the reference's weights where sync_ref_model changes them."""
        if self.args.sync_ref_model and self.ranks.process == 0:
            save_model(self._reference.model, os.path.join(folder, _REFERENCE_FILE))

    def load_more(self, folder: str) -> None:
        """Read what save_more() wrote."""
        if self.args.sync_ref_model:
            load_model(self._reference.model, os.path.join(folder, _REFERENCE_FILE))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with model_card_of(self, output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """README.md in output_dir, which Trainer asks for when it pushes a model: what was trained on what."""
        with model_card_of(self, self.args.output_dir):
            pass

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, Any]:
        model, loader = super()._prepare_for_training(*args)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # A language model's never change; and a forward that ran out of memory would be one exchange ahead.
            model.broadcast_buffers = False
        return model, loader

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        synchronize_replicas(model, self.accelerator)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        noise = noisy_embeddings(self.model, self.args.neftune_noise_alpha)
        with noise, offloaded_activations(self.model, self.args):
            return super()._inner_training_loop(*args, **kwargs)

    def _totals(self, examples: StepExamples) -> StepTotals:
        running = self._running_rewards
        earlier = None if running is None else running.tensor(self.args.device)
        return StepTotals(examples.num_pairs, examples.num_chosen_tokens, earlier)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one optimizer step's pairs, micro-batch by micro-batch. Returns the mean loss.

        Where memory runs out, max_tokens is halved and the same step repeated.

        Raises:
            FloatingPointError: a loss that is not finite, with the rows of its pairs.
            RuntimeError: no memory even for one pair at a time; or, where other ranks wait inside a forward or for
                gradients, for a micro-batch.
        """
        start = time.perf_counter()
        if inputs.report is not None:
            self.data_reports["train"] = inputs.report
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

        def attempt() -> OptimizerStep:
            batches = self._training_packer.on_device(inputs, self.max_tokens)
            return OptimizerStep(self._settings, model, batches, self._totals(inputs))

        batches, result = run_until_it_fits(attempt, self._halve, model)
        loss = torch.cat(result.losses).sum()
        addends = [loss] if result.balancing is None else [loss, result.balancing]
        of_pairs, *balancing = torch.stack([value.double() for value in addends]).tolist()  # the step's one host sync
        positions = sum(batch.num_tokens for batch in batches)
        total, seen = self.data_ranks.all_reduce_sum([of_pairs / inputs.num_pairs + sum(balancing), positions])
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += int(seen)
        if not math.isfinite(total):
            rows = rows_not_finite(inputs, batches, result.losses, self.data_ranks)
            raise not_finite(rows, self.data_reports["train"], self.state.global_step + 1, self.args.output_dir)
        if self._running_rewards is not None:
            self._running_rewards.add(torch.cat(result.rewards))
        self._window.sums.add_all(result.sums)
        self._window.add_step(inputs, batches, time.perf_counter() - start)
        return torch.full_like(loss, total)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: training_step counts the positions of a step, which have no pads."""

    def _halve(self, batches: Sequence[PackedBatch]) -> None:
        """Halve max_tokens, after these micro-batches did not fit."""
        self.max_tokens = halved_max_tokens(self.max_tokens, batches, self.data_ranks, self.state.global_step + 1)
        self.max_forward_tokens = min(self.max_forward_tokens, self.max_tokens)

    def floating_point_ops(self, inputs: Any) -> float:
        """6·parameters·positions of the last step, for LM head and backbone; Trainer adds it up as total_flos."""
        own = self.data_ranks.size / self.data_ranks.processes  # Trainer adds up what all processes computed
        return own * step_flops(self.model, self._window.last_tokens, self._window.last_targets)

    # ---- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on the constructor's eval_dataset, or on further preference data in any format, or a dict of them."""
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepared(self, dataset: Any, name: str) -> Dataset:
        """Tokens and reference log-probs of further data."""
        tokens = self._data.tokenized(dataset, name)
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

        def step_of(examples: StepExamples, sums: MetricSums) -> OptimizerStep:
            batches = self._packer.on_device(examples, self.max_forward_tokens)
            return OptimizerStep(self._settings, model, batches, self._totals(examples), sums)

        def after_each() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        with self._packer.ahead(iter(dataloader), lambda: self.max_forward_tokens) as steps:
            found = evaluate_pairs(steps, step_of, self.data_ranks, after_each)
        self.pair_records[metric_key_prefix] = found.records
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.metrics.items()}
        rewards = found.records.rewards()  # predict() returns them
        return EvalLoopOutput(predictions=rewards, label_ids=None, metrics=metrics, num_samples=found.num_pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a training log."""
        if "loss" in logs or ("train_loss" in logs and self._window.has_steps):
            if isinstance(self.train_dataset, Dataset):  # of rows that were read; an epoch would map the whole file
                release_pages(mapped_files(self.train_dataset))
            logs = {**logs, **self._window.read(self.data_ranks), "truncated": self.data_reports["train"].truncated}
        super().log(logs, start_time)
