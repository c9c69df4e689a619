"""What is refused before a run begins, by name and with what to use instead.

options    options of transformers.TrainingArguments and of TRL that the step never reads
methods    methods of transformers' Trainer and of TRL's that a subclass overrides and that are never called
arguments  arguments of the trainer: a configuration of TRL's, functions of Trainer's that the step has no use for
launch     devices, processes and launchers; the trainer's own copy of its arguments
"""
