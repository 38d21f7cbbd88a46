"""Small modules that several methods attach to features, and the blocks made of them."""
