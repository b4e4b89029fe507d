"""anymamba's `causal_conv1d`: importing it puts the modules of `anymamba.compat.causal_conv1d` in its place."""

from anymamba.compat import provide

provide(__name__)
