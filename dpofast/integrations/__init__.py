"""Drop-ins for trainers that people already run: trl.py and liger.py. Each imports its library when it is used."""
