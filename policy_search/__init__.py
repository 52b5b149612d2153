"""The plan of a job: what lives where, the batch shape, and the byte formulas behind them."""
