"""Forward-only passes: log-probs and rewards of pairs and lists, and the cache of reference log-probs.

score         Forward, response_logps, score_rows: the forward-only pass
pixels        rows with images, a few at a time with their pixels
ahead         Ahead: an iterator that prepares its next item in a background thread
windows       rows that are scored together, and what stands beside their token ids
responses     ResponseLogps, its result: log-probs of every response token
score_table   what an evaluation reports of scored rows
score_file    score files that survive a kill
ref_cache     add_reference_columns: reference log-probs, read from the cache or computed
ref_store     the cache's files
fingerprints  hashes of a model, token ids and images, which say what a cache belongs to
"""
