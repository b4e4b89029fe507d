"""Parts that layers share: the layer protocol, states, padding, norms, convolutions and options."""
