"""Our engines on one GPU: checked, measured, beside its peers and the card's limits."""
