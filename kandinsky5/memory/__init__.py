"""Memory estimates, and memory options that fit a device."""
