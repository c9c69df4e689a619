"""The claims of the DPO paper (arXiv 2305.18290), tested on toys that two CPU cores can run: README.md here."""
