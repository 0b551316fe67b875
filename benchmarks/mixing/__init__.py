"""Which maps between couplings pay, and how to train them."""
