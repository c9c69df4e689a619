"""What every layer may use: backends, autograd helpers, process groups, files, memory."""
