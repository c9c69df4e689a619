"""`dpofast demo`: a small model learns a text from scratch, then by DPO to prefer kind answers.

- run: the command, from the text to the final tables
- world: topics, facts and phrases that all text is made of
- make_data: writes the bundled text and pairs
- language_model: tokenizer and pre-training of the small Llama
- answers: sampled answers and how they are judged
"""
