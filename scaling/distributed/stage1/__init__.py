"""Stage 1 on Ray Train: a driver, workers, and what the driver hears of them."""
