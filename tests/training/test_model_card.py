"""README.md of a trained model: what was trained on what, with which loss."""

from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.support.tiny import save_tiny
from tests.support.tiny_training import make_trainer


def test_the_card_says_what_was_trained_on_what_with_which_loss(tmp_path):
    folder = save_tiny(tmp_path / "little-llama")
    trainer = make_trainer(
        tmp_path / "run",
        model=AutoModelForCausalLM.from_pretrained(folder),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        loss_type="ipo",
        beta=0.25,
    )
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert "base_model: little-llama\nlibrary_name: peft\n" in card and "# run\n" in card
    assert "| Trained | an adapter (LoraConfig) |" in card and "| Loss | `ipo`, beta 0.25 |" in card
    assert "| Data | train: 12 pairs of `train data` |" in card and "| Steps | 3 of 4 pairs |" in card
    assert str(tmp_path) not in card


def test_a_card_of_ones_own_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    trainer = make_trainer(tmp_path / "run")
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text() == "mine"
    trainer.save_model(str(tmp_path / "other"))
    trainer.save_model(str(tmp_path / "other"))  # its own card is written again
    assert "| Trained | all weights |" in (tmp_path / "other" / "README.md").read_text("utf-8")
