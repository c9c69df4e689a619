"""DPOTrainer: transformers' Trainer with a batch-exact preference step.

A step takes the same pairs, in the sampler's order, as a trainer that pads them would, divides them among the ranks,
packs each share into micro-batches of at most max_tokens positions, and divides by the number of pairs of the whole
step. So the result depends neither on max_tokens nor on how many micro-batches and ranks there are: pairs per step is a
hyperparameter, max_tokens a property of the machine.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from dpofast.checkpointing.folder import where_to_go_on
from dpofast.checkpointing.fsdp import cast_parameters, forward_dtype, parameters_in
from dpofast.checkpointing.identity import reference_identity
from dpofast.checkpointing.trainer import CheckpointedTrainer
from dpofast.common.ranks import Ranks
from dpofast.data.arrow import mapped_files, release_pages
from dpofast.data.formats import ID_COLUMNS, REF_COLUMNS
from dpofast.data.load import tokenize_preferences
from dpofast.evaluation.metrics import MetricSums, check_best_metric
from dpofast.evaluation.pair_records import PairRecords
from dpofast.evaluation.statistics import length_statistics
from dpofast.losses.pairs import StepTotals
from dpofast.model.moe import balancing_coefficient
from dpofast.packing.pack import PackedBatch, pack
from dpofast.scoring.ref_cache import CACHE_FOLDER, add_reference_columns
from dpofast.scoring.score import Forward
from dpofast.training.config import DPOConfig
from dpofast.training.coupled import RunningRewards
from dpofast.training.launch import check_topology
from dpofast.training.log_window import LogWindow
from dpofast.training.out_of_memory import (
    StepOutOfMemory,
    halved_max_tokens,
    probe_max_tokens,
    random_states,
    restore_random_states,
)
from dpofast.training.preference_step import PreferenceStep
from dpofast.training.prepare import prepared_model, vocabulary
from dpofast.training.ref_model import MOVING_OPTIONS, MovingReference, ReferenceModel, on_device
from dpofast.training.sampler import StepExamples, StepLoader, step_loader
from dpofast.training.step import OptimizerStep

# Large enough for full GEMM speed; on a CPU a pass without gradients is fastest where its activations stay in cache.
_MAX_TOKENS_GPU, _MAX_TOKENS_CPU, _FORWARD_TOKENS_CPU = 16384, 2048, 1024
# More than this makes nothing faster.
_AUTO_TOKENS_GPU = 65536
_OPTIMIZER_BYTES = 8  # AdamW's two float32 moments of a parameter

_REFERENCE_FILE = "moving_reference.safetensors"  # in a checkpoint


class DPOTrainer(CheckpointedTrainer):
    """Direct Preference Optimization (arXiv 2305.18290) on packed batches.

    Args:
        model: a causal language model, a PEFT model, or a name or folder that AutoModelForCausalLM loads (in float32).
        ref_model: the reference; None means the model as it is now (with peft_config its base model).
        args: a DPOConfig.
        train_dataset: preference pairs in any of the formats of dpofast.tokenize_preferences.
        eval_dataset: the same, held out; a dict of them is evaluated one by one, each under its name.
        processing_class: the tokenizer; None loads the one that lies beside the model.
        peft_config: wraps the model by peft.get_peft_model.
        callbacks: further TrainerCallbacks.
        optimizers: an optimizer and a scheduler of your own.

    Raises:
        ValueError: a model that cannot run packed (nor, with padded=True, over padded rows), data that cannot be used
            (DataError, with its row), an argument out of range, several GPUs in one process.
    """

    train_dataset: Any
    eval_dataset: Any
    identity_columns = ID_COLUMNS

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
        check_topology(args)
        self.loss = args.preference_loss()
        # The step below makes the micro-batches, so Trainer sees one batch a step.
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        args.dataloader_pin_memory = False  # batches are numpy arrays until they are packed
        torch.manual_seed(args.seed)
        model, processing_class = prepared_model(model, ref_model, args, processing_class, peft_config)
        args.torch_compile_backend = None  # it is done, and accelerate would compile the whole model
        self.data_reports: dict[str, Any] = {}
        self._tokenize_options = {
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "on_bad_row": args.on_bad_row,
            "num_proc": args.dataset_num_proc,
            "vocab_size": vocabulary(model),
        }
        # What each evaluation saw of every pair, the last one's under its prefix ("eval").
        self.pair_records: dict[str, PairRecords] = {}
        use_cache = getattr(model.config, "use_cache", None)
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
        if use_cache is not None:
            # Trainer turned it off, and the saved model would generate without a cache; packed rows never use one.
            self.model.config.use_cache = use_cache
        check_best_metric(args, self.loss.needs_reference, self.eval_dataset)
        self._forward_dtype = forward_dtype(self.accelerator)
        if self.loss.bco_delta == "running_mean":
            self.add_callback(RunningRewards())
        if self.train_dataset is not None:
            pairs, step = len(self.train_dataset), args.per_device_train_batch_size * self.ranks.size
            if args.dataloader_drop_last and pairs < step:
                raise ValueError(
                    f"dataloader_drop_last: {pairs} pairs are fewer than the {step} of a step, so nothing would be "
                    "trained: leave it off, or set a smaller per_device_train_batch_size"
                )
        # padded rows repeat the prompt, so max_tokens counts it for each of them
        self.share_prompts = args.share_prompts and not args.padded
        on_cpu = args.device.type == "cpu"
        default = _MAX_TOKENS_CPU if on_cpu else _MAX_TOKENS_GPU
        self.max_tokens = args.max_tokens if isinstance(args.max_tokens, int) else default
        self.max_forward_tokens = min(self.max_tokens, _FORWARD_TOKENS_CPU) if on_cpu else self.max_tokens
        live = self.loss.needs_reference and not args.precompute_ref_log_probs
        self._reference = ReferenceModel(self.model, ref_model, new_adapter=peft_config is not None, live=live)
        if self._reference.model is not None:
            self._reference.model.to(args.device)
            cast_parameters(self._reference.model, self._forward_dtype)
        text_config = self.model.config.get_text_config()
        balancing = balancing_coefficient(text_config, args.router_aux_loss_coef)
        if balancing and args.padded:
            raise ValueError("router_aux_loss_coef: padded rows give no load-balancing loss; set it to 0")
        self.forward = PreferenceStep(
            loss=self.loss,
            reference=self._reference if live else None,
            ranks=self.ranks,
            device=args.device,
            autocast=self.accelerator.autocast,
            max_logits_bytes=args.max_logits_bytes,
            token_statistics=args.token_statistics,
            balancing=balancing,
        )
        in_data = self.train_dataset is not None and set(REF_COLUMNS) <= set(self.train_dataset.column_names)
        compared = self.loss.needs_reference and not in_data
        self._reference_identity = reference_identity(self.model, ref_model) if compared else {}
        if args.ddp_find_unused_parameters is None and not hasattr(text_config, "num_experts_per_tok"):
            args.ddp_find_unused_parameters = False  # a search in every step, and only experts can go unused
        self.optimizer_step = OptimizerStep(self.forward, self.accelerator)
        if args.torch_compile and self.optimizer_step.is_sharded:
            raise ValueError("torch_compile: expected a model that is whole on every rank, and this one is sharded")
        self._window = LogWindow()
        if args.precompute_ref_log_probs and self.loss.needs_reference:
            if self.train_dataset is not None:
                self.train_dataset = self._with_reference(self.train_dataset, "train")
            self.eval_dataset = _each(self._with_reference, self.eval_dataset)
            self._reference.release()
        if args.sync_ref_model:
            if self.optimizer_step.is_sharded:
                raise ValueError(
                    "sync_ref_model: expected a policy that is whole on every rank, and this one is sharded"
                )
            if self._reference.model is None:
                raise ValueError(
                    "sync_ref_model: the reference is the base model under the adapter, which does not move; train all "
                    "weights, or give a ref_model"
                )
            alpha, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self.add_callback(MovingReference(self._reference.model, alpha, steps))
        if args.max_tokens == "auto":
            self.max_tokens = self._auto_max_tokens()

    # ---- data -------------------------------------------------------------------------------------------------------

    def _tokenized(self, dataset: Dataset, name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name}_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
        source = dataset.info.dataset_name or f"{name} data"
        tokens, self.data_reports[name] = tokenize_preferences(dataset, source=source, **self._tokenize_options)
        return tokens.with_format("numpy")

    def get_train_dataloader(self) -> StepLoader:
        """This rank's share of every step."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: expected preference pairs to train on, got None")
        args = self.args
        return step_loader(
            self.train_dataset,
            self._train_batch_size,
            self.ranks,
            args,
            strategy=args.train_sampling_strategy,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """This rank's share of every evaluation batch."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return step_loader(dataset, self.args.eval_batch_size, self.ranks, self.args, strategy="sequential")

    def _packed(self, examples: Sequence[dict[str, Any]], max_tokens: int | None) -> list[PackedBatch]:
        weighted = self.loss.ld_alpha is not None and len(examples) > 0 and REF_COLUMNS[0] in examples[0]
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

    @property
    def ref_model(self) -> Any:
        """The reference, where it is a model of its own that is still needed."""
        return self._reference.model

    def _with_reference(self, dataset: Dataset, name: str) -> Dataset:
        if set(REF_COLUMNS) <= set(dataset.column_names):
            return dataset
        begun = self.state.global_step > 0 and (self._reference.is_policy or self.optimizer_step.is_sharded)
        if self._reference.released or begun:
            raise ValueError(
                f"{name}_dataset: its reference log-probs need the reference model, which is gone once "
                "precompute_ref_log_probs=True has computed them: pass this dataset to the constructor, or set it to "
                "False"
            )
        args = self.args
        forward = Forward(
            max_tokens=self.max_forward_tokens,
            share_prompts=self.share_prompts,
            max_logits_bytes=args.max_logits_bytes,
            device=args.device,
            autocast=self.accelerator.autocast,
        )
        shown = not args.disable_tqdm and self.ranks.rank == 0
        with (
            self._reference.of(self.model) as model,
            on_device(model, args.device),
            parameters_in(model, self._forward_dtype),
        ):
            return add_reference_columns(
                dataset,
                model,
                forward,
                cache_dir=args.ref_cache_dir or os.path.join(args.output_dir, CACHE_FOLDER),
                ld_alpha=self.loss.ld_alpha,
                description=f"reference log-probs, {name}" if shown else None,
                ranks=self.ranks,
            )

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def run_identity(self) -> dict[str, Any]:
        """The loss and the reference, too."""
        loss = {f.name: getattr(self.loss, f.name) for f in fields(self.loss) if f.init}
        loss["loss_type"], loss["loss_weights"] = loss.pop("kind"), loss.pop("weights")
        own = {"disable_dropout": self.args.disable_dropout, **self._reference_identity}
        moving = {name: getattr(self.args, name) for name in MOVING_OPTIONS if self.args.sync_ref_model}
        return {**super().run_identity(), **loss, **own, **moving}

    def progress_state(self) -> dict[str, Any]:
        """The sums since the last log, and the tokens since the first step."""
        return self._window.state()

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._window.load(state)

    def save_more(self, folder: str) -> None:
        """A reference that moves."""
        if self.args.sync_ref_model and self.ranks.rank == 0:
            save_model(self._reference.model, os.path.join(folder, _REFERENCE_FILE))

    def load_more(self, folder: str) -> None:
        """Go on with it."""
        if self.args.sync_ref_model:
            load_model(self._reference.model, os.path.join(folder, _REFERENCE_FILE))

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, Any]:
        model, loader = super()._prepare_for_training(*args)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # A language model's never change; and a forward that ran out of memory would be one exchange ahead.
            model.broadcast_buffers = False
        return model, loader

    def _totals(self, examples: StepExamples) -> StepTotals:
        running = self._running_rewards
        earlier = None if running is None else running.tensor(self.args.device)
        return StepTotals(examples.num_pairs, examples.num_chosen_tokens, earlier)

    @property
    def _running_rewards(self) -> RunningRewards | None:
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, RunningRewards))
        return next(found, None)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one optimizer step's pairs, micro-batch by micro-batch. Returns the mean loss.

        Where they do not fit into memory, max_tokens is halved and the same step done again.

        Raises:
            FloatingPointError: a loss that is not finite, with the rows of its pairs.
            RuntimeError: no memory even for one pair at a time; or, where other ranks wait inside a sharded forward or
                for gradients, for a micro-batch.
        """
        start = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        draws = random_states(self.args.device)
        while True:
            batches = self._packed(inputs, self.max_tokens)
            try:
                losses, rewards, sums = self.optimizer_step.run(model, batches, self._totals(inputs))
                break
            except StepOutOfMemory:
                self._halve_max_tokens(model, batches)
                restore_random_states(draws, self.args.device)
        loss = torch.cat(losses).sum()
        total = self.ranks.all_reduce_sum([loss.item()])[0] / inputs.num_pairs
        if not math.isfinite(total):
            self._raise_not_finite(inputs, batches, losses)
        if self._running_rewards is not None:
            self._running_rewards.add(torch.cat(rewards))
        self._window.sums.add_all(sums)
        self._window.add_step(inputs, batches, time.perf_counter() - start)
        return torch.full_like(loss, total)

    def _halve_max_tokens(self, model: nn.Module, batches: list[PackedBatch]) -> None:
        model.zero_grad(set_to_none=True)
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        step = self.state.global_step + 1
        self.max_tokens = halved_max_tokens(self.max_tokens, batches, self.ranks, step)
        self.max_forward_tokens = min(self.max_forward_tokens, self.max_tokens)

    def _auto_max_tokens(self) -> int:
        """What fits, on every rank: probed with the first rows of the data."""
        if self.optimizer_step.is_sharded:
            raise ValueError("max_tokens: 'auto' cannot probe a model that is sharded later; give a number")
        cap = _MAX_TOKENS_CPU if self.args.device.type == "cpu" else _AUTO_TOKENS_GPU
        if self.train_dataset is None:
            return cap
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        fitting = probe_max_tokens(self._probe, self.args.device, cap, kept=_OPTIMIZER_BYTES * trained)
        return -int(self.ranks.all_reduce_max(-fitting))

    def _probe(self, positions: int) -> int:
        """Forward and backward of a micro-batch of the first rows; returns its positions, and leaves no trace."""
        examples = StepExamples()
        prompt, *responses = ID_COLUMNS
        counted = [prompt, *responses] if self.share_prompts else [prompt, prompt, *responses]
        for example in self.train_dataset:
            examples.append(example)
            positions -= sum(len(example[name]) for name in counted)
            if positions <= 0:
                break
        examples.num_pairs = examples.num_chosen_tokens = len(examples)
        (batch,) = self._packed(examples, None)
        draws = random_states(self.args.device)
        self.model.train()
        alone = replace(self.forward, ranks=Ranks.alone())
        for output in alone.outputs(self.model, [batch], self._totals(examples), MetricSums()):
            output.loss.backward()
        self.model.zero_grad(set_to_none=True)
        restore_random_states(draws, self.args.device)
        return batch.num_tokens

    def _raise_not_finite(self, examples: Any, batches: list[PackedBatch], losses: list[Tensor]) -> NoReturn:
        own = [
            int(examples[int(example)]["row"])
            for batch, pair_losses in zip(batches, losses[: len(batches)], strict=True)
            for example, value in zip(batch.pair_examples, pair_losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        rows = sorted(row for theirs in self.ranks.all_gather(own) for row in theirs)
        report = self.data_reports["train"]
        raise FloatingPointError(
            f"{report.source}: the loss of the pairs in {report.unit}s {rows} is not finite at step "
            f"{self.state.global_step + 1}, which was not taken; {where_to_go_on(self.args.output_dir)}. Look at these "
            "pairs, and at a learning rate that is too high"
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
        records = PairRecords()
        count = 0
        for examples in dataloader:
            batches = self.optimizer_step.with_idle(self._packed(examples, self.max_forward_tokens))
            outputs = self.forward.outputs(model, batches, self._totals(examples), sums)
            for batch, output in zip(batches, outputs, strict=True):
                sums.add("loss", output.losses.sum(), len(output.losses))
                if batch is not None:
                    records.add(examples, batch, output)
            count += examples.num_pairs
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        records = self.pair_records[metric_key_prefix] = records.joined(self.ranks)
        means = sums.means(self.ranks) | length_statistics(records.table()).metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a training log."""
        if "loss" in logs:
            release_pages(mapped_files(self.train_dataset))  # of rows that were read; an epoch would map the whole file
            logs = {**logs, **self._window.read(self.ranks), "truncated": self.data_reports["train"].truncated}
        super().log(logs, start_time)


def _each(prepare: Callable[[Dataset, str], Dataset], dataset: Any) -> Any:
    """Prepare the eval dataset, or each of several."""
    if isinstance(dataset, dict):
        return {name: prepare(part, f"eval {name}") for name, part in dataset.items()}
    return None if dataset is None else prepare(dataset, "eval")
