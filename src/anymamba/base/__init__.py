"""What every level may use: files written whole or not at all, dataclasses as JSON, checks of sizes, errors."""
