"""Kandinsky 5: the model, its conditioning, training and sampling."""
