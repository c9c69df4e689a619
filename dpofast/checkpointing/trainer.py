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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, ProcessorMixin

from dpofast.checkpointing.callback_state import callback_states, restore_callback_states
from dpofast.checkpointing.folder import (
    LOCK,
    STATE,
    check_writable,
    entries_of,
    newest_whole,
    read_manifest,
    remove_leftovers,
    resolve_checkpoint,
    rotate,
    seal,
    staging_folder,
)
from dpofast.checkpointing.fsdp import first_shard
from dpofast.checkpointing.identity import (
    check_same_run,
    dataset_identity,
    options_identity,
    parameters_identity,
    tokenizer_identity,
)
from dpofast.checkpointing.model_files import ModelFiles, made_resumable
from dpofast.checkpointing.progress import Resumed, Written, check_other_ranks, progress_file, read_progress, seed_anew
from dpofast.checkpointing.sharded import own_shard_files
from dpofast.checkpointing.signals import Interruption, TrainingInterrupted
from dpofast.checkpointing.write_errors import room
from dpofast.checkpointing.zero import is_partitioned
from dpofast.common.locks import WriteLock
from dpofast.common.output import lasting_output
from dpofast.common.ranks import Ranks


class CheckpointedTrainer(ModelFiles):
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
        with made_resumable(args, model):
            super().__init__(model=model, args=args, **options)
        self.ranks = self.data_ranks = Ranks()
        self._interruption = Interruption()
        self._lock = WriteLock(Path(self.args.output_dir), Path(self.args.output_dir, LOCK))

    def run_identity(self) -> dict[str, Any]:
        """Returns what a resumed run must have in common with the one that wrote its checkpoint: names and JSON values.

        Called when training begins, before weights are loaded; a subclass adds its own.
        """
        identity = {**options_identity(self.args, self.data_ranks.size), **parameters_identity(self.model)}
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

    def merged_progress(self, states: list[dict[str, Any]], first: bool) -> dict[str, Any]:
        """Returns one state of all ranks' progress_state(), to continue on another number of ranks.

        Args:
            states: of each rank that wrote the checkpoint.
            first: for the first rank, which continues with the sums; the others begin with none.
        """
        return states[0]

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
            ValueError: there is no checkpoint, or it was written by another run (data, options, pairs per step);
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
        with self.output_locked(), lasting_output(), self._interruption:
            found: Resumed | None = self._together(lambda: self._prepare(resume_from_checkpoint))
            self._resumed, self._begins = found, found is not None
            try:
                return super().train(found and found.folder, trial, ignore_keys_for_eval)
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

    def _prepare(self, resume: str | bool | None) -> Resumed | None:
        """Check what is to be resumed before anything is loaded; returns what to resume."""
        is_sharded = first_shard(self.model) is not None or is_partitioned(self.model)
        if self.args.should_save or is_sharded:  # reading shards is a collective
            self._identity = self.run_identity()
        if not self.args.should_save:
            return None
        remove_leftovers(self.args.output_dir)
        if not resume:
            return None
        folder = resolve_checkpoint(resume, self.args.output_dir)
        manifest = read_manifest(folder)
        written = Written.by(manifest)
        if not written.equals(self.data_ranks):
            check_other_ranks(written, self.data_ranks, folder, is_zero=self.is_deepspeed_enabled)
        same_length = check_same_run(manifest["run"], self._identity, folder, self.data_ranks.size)
        # keep entries that this part of the run does not have, such as data of an evaluation that is left out
        self._identity = {**manifest["run"], **self._identity}
        return Resumed(str(folder), written, same_length)

    def _run_epoch(self, **arguments: Any) -> None:
        if self._resumed is not None and self._begins:
            self._load_progress(self._resumed)
            self._begins = False
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
            lambda: self._save_weights(str(staged)),
        ]
        if not self.args.save_only_model:
            files = (self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state, self._save_progress)
            parts += [partial(save, str(staged)) for save in (*files, self.save_more)]
        try:
            for part in parts:
                self._together(part)
            digests = self._each(lambda: entries_of(staged, own_shard_files(staged, self.ranks.process)))
            self._together(lambda: self._seal(staged, folder, dict(chain(*(own.items() for own in digests)))))
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

    def _seal(self, staged: Path, folder: Path, known: dict[str, Any]) -> None:
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
            "data_ranks": self.data_ranks.size,
            "save_only_model": self.args.save_only_model,
            "run": self._identity,
        }
        seal(staged, folder, facts, known)

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

    # ---- what Trainer leaves out of a checkpoint --------------------------------------------------------------------

    def _save_progress(self, folder: str) -> None:
        """Sums since the last log, and whether a callback (early stopping) ended the run here."""
        own = {
            "tr_loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "stopped": self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            "subclass": self.progress_state(),
        }
        torch.save(own, progress_file(folder, self.args.process_index, self.args.world_size))

    def _load_progress(self, resumed: Resumed) -> None:
        device = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch.load knows no "cpu:0"
        found = read_progress(resumed.folder, resumed.written, self.data_ranks, device, self.merged_progress)
        self._tr_loss, self._globalstep_last_logged = found.tr_loss, found.last_logged
        # train_loss is the mean over the steps since resuming.
        self._total_loss_scalar = -self._tr_loss.item()
        self._stopped = found.stopped and resumed.same_length and self._ended_early(resumed.folder)
        self.load_progress_state(found.subclass)
        self.load_more(resumed.folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is None or self._resumed.written.equals(self.data_ranks):
            super()._load_rng_state(checkpoint)
        else:
            seed_anew(self.args.seed, self.state.global_step, self.data_ranks.rank)

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
            self.callback_handler.callbacks,
            self.state.stateful_callbacks,
            self._resumed.folder if self._resumed else self.args.output_dir,
        )
