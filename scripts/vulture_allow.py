"""Names that look unused and are not. Each has its reason."""
