"""Training loops to copy from, one file each; test_recipes.py runs them."""
