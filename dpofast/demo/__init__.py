"""`dpofast demo`: trains a small language model from scratch, then trains it by DPO to prefer kind answers.

- run: the command, from pre-training to the final tables
- world: the topics, facts and phrases that all text is generated from
- make_data: writes the bundled text and preference pairs
- language_model: tokenizer and pre-training of the small Llama
- answers: samples answers and classifies them
"""
