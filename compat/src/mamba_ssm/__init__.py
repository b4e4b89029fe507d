"""anymamba's `mamba_ssm`: importing it puts the modules of `anymamba.compat.mamba_ssm` in its place."""

from anymamba.compat import provide

provide(__name__)
