"""Conversations -> text and token ids by the tokenizer's chat template, and which of the tokens are trained.

render        the template's text, refused where it loses or displaces what the turns say
train_tokens  the tokens of the turns that count: the assistant's, or as `train` flags say
"""
