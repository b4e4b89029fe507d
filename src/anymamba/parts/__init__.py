"""What layers are made of: the protocol, states, padding, norms, convolutions, options; free of any one layer."""
