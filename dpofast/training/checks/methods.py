"""Methods that a subclass may override and that the packed step never calls: such a class is refused."""

from __future__ import annotations

_LOSS = "the step computes loss and gradients itself; a loss of your own: docs/own_loss.md"
_EVALUATION = "evaluation has no predictions but metrics; override evaluate() or evaluation_loop()"
_DATA = "pairs are tokenized, ordered and packed by dpofast; change the dataset instead"
# name -> what to do instead; Trainer's, then TRL's
NOT_CALLED = {
    **dict.fromkeys(
        "compute_loss compute_loss_context_manager autocast_smart_context_manager _prepare_inputs".split(),
        _LOSS,
    ),
    **dict.fromkeys("prediction_step _gather_and_numpify _nested_gather compute_metrics".split(), _EVALUATION),
    **dict.fromkeys(
        "_get_train_sampler _get_eval_sampler _get_dataloader _get_collator_with_removed_columns "
        "_remove_unused_columns _set_signature_columns_if_needed".split(),
        _DATA,
    ),
    **dict.fromkeys(
        "_compute_loss _compute_loss_liger dpo_loss concatenated_forward concatenated_inputs get_batch_loss_metrics "
        "compute_ref_log_probs compute_reference_log_probs compute_ref_logps _compute_ref_logps".split(),
        _LOSS,
    ),
    **dict.fromkeys(
        "_prepare_dataset _precompute_ref_logps _truncate_inputs tokenize_row process_row _tokenize".split(), _DATA
    ),
}


def check_methods(cls: type, base: type) -> None:
    """Check a subclass of the trainer.

    Raises:
        ValueError: it overrides a method that would not be called.
    """
    for name, way in NOT_CALLED.items():
        if getattr(cls, name, None) is not getattr(base, name, None):
            raise ValueError(f"{cls.__name__}.{name} would not be called: {way}")
