"""What is measured of preference pairs."""
