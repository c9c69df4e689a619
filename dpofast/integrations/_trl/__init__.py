"""What patch_trl() puts into TRL, a module a seam."""
