"""Images of prompts in data: as files, bytes or PIL images in rows, and as what a model's processor makes of them.

- columns: their columns in rows and in token-level datasets
- decode: one image as it is given -> a PIL image, or why it cannot be used
- stored: images of rows <-> their form in Arrow, encoded bytes or a path
- prompt_images: PromptImages: the processor's token ids and pixels of a prompt
- shown: token ids of a prompt with images as text, for people
"""
