"""What is measured of preference pairs.

- metrics: MetricSums, the logged metrics; check_best_metric, their names
- pair_records: PairRecords, the numbers of every pair of an evaluation, and the best and worst pairs
- statistics: accuracy and margins with 95 % intervals, and statistics of length
"""
