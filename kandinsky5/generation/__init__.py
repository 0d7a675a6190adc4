"""The generation script: plan, models, sampling and output files."""
