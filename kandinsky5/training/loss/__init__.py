"""The training objective: timesteps, flow matching loss and prior preservation."""
