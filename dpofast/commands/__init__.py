"""The commands of the command line, one a module; each has a `main(argv)` that returns the exit code."""
