"""What `dpofast tune` measured on this machine, which backend="auto" reads."""
