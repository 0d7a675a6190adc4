"""Building blocks that know nothing of Kandinsky."""
