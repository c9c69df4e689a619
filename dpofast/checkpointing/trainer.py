"""CheckpointedTrainer: transformers' Trainer with atomic checkpoints and an exact resume.

A run that is killed at any moment and resumed ends with the same weights and logs the same losses, bit for bit, as an
uninterrupted one (same machine, same number of threads). A checkpoint folder appears complete or not at all
(folder.py), stores what Trainer leaves out (the sums between two logs, callbacks' counters), and is refused by a run
with other data, options or weights (identity.py).

A save that fails, on a full disk for example, is reported and training continues: the next save is tried as usual, and
once more when training ends. If that fails too, train() writes the weights alone if they fit and raises OSError.
SIGTERM, SIGINT and SIGHUP let the step end, write a checkpoint and stop. An evaluation that is due runs first, because
the resumed run would skip it. A second run into the same folder is refused while the first one trains.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, ProcessorMixin, Trainer

from dpofast.checkpointing.callback_state import callback_states, restore_callback_states
from dpofast.checkpointing.folder import (
    LOCK,
    STATE,
    check_writable,
    newest_whole,
    read_manifest,
    remove_leftovers,
    resolve_checkpoint,
    rotate,
    seal,
    staging_folder,
    verify,
    where_to_go_on,
)
from dpofast.checkpointing.fsdp import first_shard, load_optimizer, load_weights, save_optimizer, saved_once
from dpofast.checkpointing.identity import (
    check_same_run,
    dataset_identity,
    options_identity,
    parameters_identity,
    tokenizer_identity,
)
from dpofast.checkpointing.signals import Interruption, TrainingInterrupted
from dpofast.checkpointing.weights import load_converted
from dpofast.checkpointing.write_errors import as_os_errors, room
from dpofast.common.locks import WriteLock
from dpofast.common.output import lasting_output
from dpofast.common.ranks import Ranks


class CheckpointedTrainer(Trainer):
    """A Trainer that writes checkpoints atomically, and resumes them exactly or refuses to.

    A subclass stores its own state by progress_state() and load_progress_state(), or save_more() and load_more().

    Args:
        model: as Trainer's.
        args: as Trainer's; callbacks' counters are always restored.
        options: Trainer's other arguments.

    Raises:
        ValueError: output_dir cannot be written to; enable_jit_checkpoint (it would write checkpoints in place).
    """

    control: Any
    # Of the training data, what training reads; None is all columns.
    identity_columns: Sequence[str] | None = None
    # Whether the model is sharded and has not trained yet: set by a subclass that shards it before train().
    sharded_early = False

    def __init__(self, model: Any = None, args: Any = None, **options: Any) -> None:
        """Check the output folder before Trainer makes it."""
        if args is not None:
            if args.should_save:
                check_writable(args.output_dir)
            if args.enable_jit_checkpoint:
                raise ValueError("enable_jit_checkpoint: leave it out: SIGTERM ends every run with a checkpoint")
        super().__init__(model=model, args=args, **options)
        self.ranks = Ranks()
        self._interruption = Interruption()
        self._lock = WriteLock(Path(self.args.output_dir), Path(self.args.output_dir, LOCK))

    def run_identity(self) -> dict[str, Any]:
        """Returns what a resumed run must have in common with the one that wrote its checkpoint: names and JSON values.

        Called when training begins, before weights are loaded; a subclass adds its own.
        """
        identity = {**options_identity(self.args), **parameters_identity(self.model)}
        tokenizer = self.processing_class
        if isinstance(tokenizer, ProcessorMixin):
            tokenizer = tokenizer.tokenizer
        if hasattr(tokenizer, "get_vocab"):
            identity["tokenizer"] = tokenizer_identity(tokenizer)
        if hasattr(self.train_dataset, "__len__"):
            identity["train_dataset"] = dataset_identity(self.train_dataset, self.identity_columns)
        if self.eval_dataset is not None:  # it decides which model is the best, and when to stop
            identity["eval_dataset"] = dataset_identity(self.eval_dataset, self.identity_columns)
        return identity

    def progress_state(self) -> dict[str, Any]:
        """Returns further state of this rank to store in checkpoints, tensors and plain values; for a subclass."""
        return {}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by progress_state(); its tensors are on args.device."""

    def save_more(self, folder: str) -> None:
        """Write what is too large for progress_state() into a checkpoint; called on every rank, for a subclass."""

    def load_more(self, folder: str) -> None:
        """Read what save_more() wrote, before the first step; called on every rank."""

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, or resume a checkpoint: its folder, or True or "latest" for the newest complete one of output_dir.

        Raises:
            DamagedCheckpoint: the named checkpoint is damaged, incomplete or of another format; nothing was loaded.
            ValueError: there is no checkpoint, or it was written by another run (data, options, number of processes);
                another process trains into output_dir; or FSDP has sharded the model already, in a train() before.
            OSError: the last state could not be written (see the module).
            TrainingInterrupted: SIGTERM, SIGINT or SIGHUP came, and a checkpoint was written.
        """
        if self.is_fsdp_enabled and first_shard(self.model) is not None and not self.sharded_early:
            raise ValueError(
                "train: this model is sharded already: build a new trainer, and resume from a checkpoint to go on"
            )
        self._unsaved: str | None = None  # why the latest state is in no checkpoint
        self._saved_step = self._ended_step = -1
        self._save_is_due = self._stopped = False
        self._same_length = True
        with self.output_locked(), lasting_output(), self._interruption:
            self._resume_folder: str | None = self._together(lambda: self._prepare(resume_from_checkpoint))
            try:
                return super().train(self._resume_folder, trial, ignore_keys_for_eval)
            except TrainingInterrupted as stop:
                if self.is_world_process_zero():
                    print(f"dpofast: {stop}", file=sys.stderr)
                raise

    @contextlib.contextmanager
    def output_locked(self) -> Iterator[None]:
        """Inside, no other process trains into output_dir; train() enters it by itself. A collective.

        Raises:
            ValueError: another process does.
        """
        with contextlib.ExitStack() as held:
            self._together(lambda: self._lock_output(held))
            yield

    def _lock_output(self, held: contextlib.ExitStack) -> None:
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            held.enter_context(self._lock)

    def _prepare(self, resume: str | bool | None) -> str | None:
        """Check what is to be resumed before anything is loaded; returns the folder to resume from."""
        if not (self.args.should_save or self.sharded_early):
            return None
        self._identity = self.run_identity()  # gathers weights that are sharded
        if not self.args.should_save:
            return None
        remove_leftovers(self.args.output_dir)
        if not resume:
            return None
        folder = resolve_checkpoint(resume, self.args.output_dir)
        manifest = read_manifest(folder)
        if manifest["world_size"] != self.args.world_size:
            raise ValueError(
                f"resume_from_checkpoint: {folder} was written by {manifest['world_size']} processes, each with random "
                f"states of its own, and these are {self.args.world_size}: start as many as then"
            )
        self._same_length = check_same_run(manifest["run"], self._identity, folder)
        # keep entries that this part of the run does not have, such as data of an evaluation that is left out
        self._identity = {**manifest["run"], **self._identity}
        return str(folder)

    def _run_epoch(self, **arguments: Any) -> None:
        if self._resume_folder is not None:
            self._load_progress(self._resume_folder)
            self._resume_folder = None
        if self._stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer would take a step beyond the last
            return
        super()._run_epoch(**arguments)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Save after logging and evaluating: Trainer calls this after each step, and again at the end of an epoch."""
        step, control = self.state.global_step, self.control
        again, self._ended_step = step == self._ended_step, step
        ends_epoch = (
            float(self.state.epoch or 0).is_integer() or control.should_training_stop or control.should_epoch_stop
        )
        if ends_epoch and not again:
            # Resuming begins with the next epoch, so what happens at this one's end must lie before the checkpoint.
            self._save_is_due, control.should_save = control.should_save, False
        elif again:
            control.should_save, self._save_is_due = control.should_save or self._save_is_due, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if (again or not ends_epoch) and self._stop_is_wished():
            self._stop(model, trial)

    def _stop_is_wished(self) -> bool:
        # a signal may reach one rank alone, or each in another step
        return bool(self.ranks.all_reduce_max(self._interruption.signal is not None))

    def _stop(self, model: Any, trial: Any) -> None:
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
        name = "a signal to another process" if self._interruption.signal is None else self._interruption.signal.name
        stopped = f"stopped by {name} after step {self.state.global_step} of {self.state.max_steps}"
        if self._unsaved is not None:
            raise TrainingInterrupted(f"{stopped}; {self._unsaved}")
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        raise TrainingInterrupted(f"{stopped}; go on with resume_from_checkpoint={str(folder)!r} (or 'latest')")

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        if self._unsaved is not None:  # there may be room by now
            self._save_checkpoint(self.model_wrapped, trial)
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            rotate(Path(self._get_output_dir(trial)), 1, [Path(best)])  # Trainer would delete in place
        output = super()._finalize_training(trial, num_train_samples, start_time)
        if self._unsaved is None:
            return output
        try:
            self._together(self.save_model)
            weights = f"the weights alone are in {self.args.output_dir}"
        except OSError as error:
            weights = f"nor could the weights alone: {error}"
        raise OSError(f"training is done, and {self._unsaved}; {weights}")

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write all ranks' files to a staging folder, rename it when complete, then delete old checkpoints."""
        step, run_dir = self.state.global_step, Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{step}"
        staged = staging_folder(folder)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        former_best = self.state.best_model_checkpoint
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best == folder or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        parts: list[Callable[[], None]] = [
            self._check_finite,
            lambda: self._begin(staged),
            lambda: self.save_model(str(staged), _internal_call=True),
        ]
        if not self.args.save_only_model:
            files = (self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state, self._save_progress)
            parts += [partial(save, str(staged)) for save in (*files, self.save_more)]
        try:
            for part in (*parts, lambda: self._seal(staged, folder)):
                self._together(part)
        except OSError as error:
            self.state.best_model_checkpoint = former_best
            self._report_unsaved(error, staged, best == folder)
            return
        self._unsaved, self._saved_step = None, step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            kept = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, [folder, *([Path(kept)] if kept else [])])

    def _begin(self, staged: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            os.makedirs(staged)

    def _seal(self, staged: Path, folder: Path) -> None:
        if not self.args.should_save:
            return
        self.state.stateful_callbacks = callback_states([*self.callback_handler.callbacks, self.control])
        self.state.save_to_json(str(staged / STATE))
        ranks = range(self.args.world_size) if self.args.world_size > 1 else ()
        missing = [rank for rank in ranks if not (staged / f"rng_state_{rank}.pth").is_file()]
        if missing and not (self.args.save_only_model or self.args.save_on_each_node):
            raise OSError(f"the files of ranks {missing} are not in {staged}: all ranks need the same output_dir")
        facts = {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "save_only_model": self.args.save_only_model,
            "run": self._identity,
        }
        seal(staged, folder, facts)

    def _report_unsaved(self, error: OSError, staged: Path, was_best: bool) -> None:
        newest = None
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            newest, _ = newest_whole(staged.parent)
        self._unsaved = (
            f"the checkpoint of step {self.state.global_step} could not be written: {error}{room(staged.parent)}; "
            + (f"the newest whole one is {newest}" if newest else "there is no whole one yet")
        )
        if self.is_world_process_zero():
            lost = "; this step was the best so far and is not kept" if was_best else ""
            warnings.warn(f"{self._unsaved}{lost}. Training goes on, and the next save is tried", stacklevel=2)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like Trainer's; raises OSError on a full disk, and ValueError for weights that are not finite."""
        if not _internal_call:
            self._together(self._check_finite)
        try:
            with as_os_errors():
                super().save_model(output_dir, _internal_call)
        except OSError as error:
            if _internal_call:
                raise
            target = Path(output_dir or self.args.output_dir)
            raise OSError(
                f"the model could not be written to {target}: {error}{room(target)}; "
                f"{where_to_go_on(self.args.output_dir)}"
            ) from error

    def _check_finite(self) -> None:
        """Raise ValueError for weights that are not finite: after the last step no loss would show an overflow."""
        for name, weight in self.model.named_parameters():
            own = weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)
            if weight.requires_grad and not own.isfinite().all():
                raise ValueError(
                    f"{name} is not finite after step {self.state.global_step}, and nothing was saved; "
                    f"{where_to_go_on(self.args.output_dir)}. Look at grad_norm in the log, and at a learning "
                    "rate that is too high"
                )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.is_fsdp_enabled and state_dict:
            state_dict = saved_once(self.model, state_dict)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:  # Trainer would write the weights again, as a pickle
            save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            load_optimizer(self, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load_weights(self.model, resume_from_checkpoint)
        elif not load_converted(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied weight is written once, so under its other name it is not missing."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # ---- what Trainer leaves out of a checkpoint --------------------------------------------------------------------

    def _progress_file(self, folder: str) -> str:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return os.path.join(folder, f"progress{rank}.pt")

    def _save_progress(self, folder: str) -> None:
        """Sums since the last log, and whether a callback (early stopping) ended the run here."""
        own = {
            "tr_loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "stopped": self.control.should_training_stop and self.state.global_step < self.state.max_steps,
        }
        torch.save({**own, "subclass": self.progress_state()}, self._progress_file(folder))

    def _load_progress(self, folder: str) -> None:
        device = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch.load knows no "cpu:0"
        state = torch.load(self._progress_file(folder), map_location=device, weights_only=True)
        self._tr_loss, self._globalstep_last_logged = state["tr_loss"], state["last_logged"]
        # train_loss is the mean over the steps since resuming.
        self._total_loss_scalar = -self._tr_loss.item()
        self._stopped = state["stopped"] and self._same_length and self._ended_early(folder)
        self.load_progress_state(state["subclass"])
        self.load_more(folder)

    def _ended_early(self, folder: str) -> bool:
        """Whether early stopping still ends the run that it ended at this checkpoint; any other callback asks anew."""
        stoppers = [found for found in self.callback_handler.callbacks if isinstance(found, EarlyStoppingCallback)]
        ended = any(found.early_stopping_patience_counter >= found.early_stopping_patience for found in stoppers)
        if self.is_world_process_zero():
            step, total = self.state.global_step, self.state.max_steps
            told = "early stopping ended the run here, so nothing is left to train" if ended else "the run goes on"
            way = ": give more patience, or another number of steps, to go on" if ended else ""
            text = f"{folder}: written when a callback stopped the run after step {step} of {total}; {told}{way}"
            warnings.warn(text, stacklevel=2)
        return ended

    def _load_callback_state(self) -> None:
        """Restore callbacks' counters, even without restore_callback_states_from_checkpoint; their options stay."""
        restore_callback_states(
            self.callback_handler.callbacks, self.state.stateful_callbacks, self._resume_folder or self.args.output_dir
        )

    def _load_best_model(self) -> None:
        self._together(lambda: verify(self.state.best_model_checkpoint) if self.args.should_save else None)
        if self.is_fsdp_enabled:
            load_weights(self.model, self.state.best_model_checkpoint)
        elif self.is_deepspeed_enabled or not load_converted(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    # ---- ranks ------------------------------------------------------------------------------------------------------

    def _together(self, part: Callable[[], Any]) -> Any:
        """Run on every rank; an error on one is raised on all, so that none waits. Returns the first result."""
        problem, result = None, None
        try:
            with as_os_errors():
                result = part()
        except (OSError, ValueError) as error:
            problem = error
        outcomes = self.ranks.all_gather((problem, result))
        first = next((theirs for theirs, _ in outcomes if theirs is not None), None)
        if first is not None:
            raise problem or first
        return next((theirs for _, theirs in outcomes if theirs is not None), None)
