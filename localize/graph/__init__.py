"""model -> Trunk: record the forward of a model as a graph over its own modules, with shapes, costs and layouts."""
