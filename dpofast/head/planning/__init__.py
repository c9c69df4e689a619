"""How an LM-head call is cut up: dtypes, what the device offers, and the rows and tiles that fit in the byte budget."""
