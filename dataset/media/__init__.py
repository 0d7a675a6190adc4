"""Images, videos and masks: listing, reading and decoding."""
