"""ModelFiles: which files a trainer's weights and optimizer are written to and read from.

Whole weights are safetensors, as save_pretrained writes them. A sharded model (FSDP2, tensor parallelism) is gathered
for them, or each rank writes its own shards (sharded.py): in checkpoints only, save_model() writes a whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from dpofast.checkpointing.folder import verify, where_to_go_on
from dpofast.checkpointing.fsdp import (
    first_shard,
    gathered,
    load_optimizer,
    load_scheduler,
    load_weights,
    load_whole_optimizer,
    save_optimizer,
    save_scheduler,
    whole_model_saved,
)
from dpofast.checkpointing.sharded import (
    is_sharded_checkpoint,
    load_sharded_optimizer,
    load_sharded_weights,
    save_sharded,
    without_weights,
)
from dpofast.checkpointing.weights import load_converted, saved_once, stored_names
from dpofast.checkpointing.write_errors import as_os_errors, room
from dpofast.common.ranks import Ranks


@contextlib.contextmanager
def made_resumable(args: Any, model: Any) -> Iterator[None]:
    """Inside, Trainer is made of a model that transformers has divided: it refuses its checkpoints but for weights."""
    if args is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield
        return
    weights_alone, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = weights_alone


class ModelFiles(Trainer):
    """A Trainer whose files are written and read as the module says; `ranks` are all processes."""

    ranks: Ranks

    @property
    def writes_shards(self) -> bool:
        """Whether each rank writes its own shards of a checkpoint: under FSDP, only if its option says so."""
        if self.is_fsdp_enabled:
            return "SHARDED_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return first_shard(self.model) is not None and not self.args.save_only_model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like Trainer's, of whole weights; raises OSError on a full disk, and ValueError for weights not finite."""
        if not _internal_call:
            self._together(self._check_finite)
        try:
            with as_os_errors(), whole_model_saved(self.accelerator):
                super().save_model(output_dir, _internal_call)
        except OSError as error:
            if _internal_call:
                raise
            target = Path(output_dir or self.args.output_dir)
            raise OSError(
                f"the model could not be written to {target}: {error}{room(target)}; "
                f"{where_to_go_on(self.args.output_dir)}"
            ) from error

    def _save_weights(self, folder: str) -> None:
        if self.writes_shards:
            without_weights(self.model, folder, partial(self._save, folder))
            save_sharded(self.model, self.optimizer, folder)
        else:
            self.save_model(folder, _internal_call=True)

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
        elif not self.is_fsdp_enabled and first_shard(self.model) is not None:
            self._save_divided(output_dir, state_dict)
            return
        super()._save(output_dir, state_dict)

    def _save_divided(self, output_dir: str | None, state_dict: Any) -> None:
        """Write the weights that transformers has divided, gathered one by one, on the first rank.

        transformers would write tied ones twice, and PEFT a rank's own shards.
        """
        if state_dict is None:
            own, state_dict = self.model.state_dict(), {}
            for key in stored_names(self.model).values():
                whole = gathered(own[key])
                if self.args.should_save:
                    state_dict[key] = whole.cpu()
        if not self.args.should_save:
            return
        config: Any = self.model.config  # PEFT's is its base model's
        divided, config.distributed_config = config.distributed_config, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.distributed_config = divided

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.writes_shards:  # the optimizer's state lies beside the weights
            save_scheduler(self, output_dir)
        elif self.is_fsdp_enabled:  # Trainer would write the weights again, as a pickle
            save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif is_sharded_checkpoint(checkpoint):
            load_sharded_optimizer(self.model, self.optimizer, checkpoint)
            load_scheduler(self, checkpoint)
        elif self.is_fsdp_enabled:
            load_optimizer(self, checkpoint)
        elif not load_whole_optimizer(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_weights(self, folder: str) -> bool:
        """Load a checkpoint's weights, unless Trainer can."""
        if is_sharded_checkpoint(folder):
            load_sharded_weights(self.model, folder)
            return True
        if self.is_fsdp_enabled:
            load_weights(self.model, folder)
            return True
        return not self.is_deepspeed_enabled and load_converted(self.model, folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied weight is written once, so under its other name it is not missing."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_best_model(self) -> None:
        self._together(lambda: verify(self.state.best_model_checkpoint) if self.args.should_save else None)
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    # ---- ranks ------------------------------------------------------------------------------------------------------

    def _together(self, part: Callable[[], Any]) -> Any:
        """Run on every rank; an error on one is raised on all, so that none waits. Returns the first result."""
        return next((theirs for theirs in self._each(part) if theirs is not None), None)

    def _each(self, part: Callable[[], Any]) -> list[Any]:
        """Like _together; returns every rank's result."""
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
        return [theirs for _, theirs in outcomes]
