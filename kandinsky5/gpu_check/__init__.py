"""Tries on this machine's GPU what training and generation need: `python -m kandinsky5.gpu_check`."""
