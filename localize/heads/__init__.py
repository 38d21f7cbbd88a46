"""Small modules that methods attach to features, and the blocks made from them."""
