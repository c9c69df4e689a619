"""trl's own DPOTrainer on dpofast's engine, by one line.

    python examples/trl_trainer.py

train_dataset: rows with prompt, chosen and rejected, as trl reads them.
"""

import trl

from dpofast.integrations.trl import patch_trl, report


def train(model, ref_model, dataset, tokenizer, folder, *, pairs_per_step=4, learning_rate=0.1):
    """One pass over the dataset; the loss of every step."""
    patch_trl()  # the one line; before the trainer is built
    args = trl.DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=pairs_per_step,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    )
    trainer = trl.DPOTrainer(
        model=model, ref_model=ref_model, args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    print(report())
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    import tempfile

    from tiny import tiny_model, tiny_text, tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        print(train(tiny_model(), tiny_model(), tiny_text(), tiny_tokenizer(), folder))
