"""trl's own DPOTrainer on dpofast's engine, by one line.

    python examples/trl_trainer.py

train_dataset: rows with prompt, chosen and rejected, as trl reads them.
"""

import trl

from dpofast.integrations.trl import patch_trl, report


def train(model, ref_model, dataset, tokenizer, args):
    """Trains as the trl.DPOConfig says; the losses that were logged."""
    patch_trl()  # the one line; before the trainer is built
    trainer = trl.DPOTrainer(
        model=model, ref_model=ref_model, args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    print(report())
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    import tempfile

    from tiny import tiny_model, tiny_text, tiny_tokenizer, trainer_options

    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(folder, bf16=False, **trainer_options())
        print(train(tiny_model(), tiny_model(), tiny_text(), tiny_tokenizer(), args))
