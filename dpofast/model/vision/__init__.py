"""Images in prompts: composite models whose language model attends causally over image tokens.

- families: what a family's processor returns for images, and how many placeholders each has
- inputs: vision_inputs(model).of_prompt(prompt_ids, processed) -> PromptMedia, the media of an example
- example: the processor's output for a small random image, for the parity check
- idle: an image that no row has, where calls of the vision tower are collectives
- merge: the composite's own forward over a packed row or padded rows, its language model with the layout
- positions: positions of a packed row by the model's own rule
"""
