"""Our models and operators under the interfaces of other libraries."""

from anymamba.compat.drop_in import activate, provide

__all__ = ["activate", "provide"]
