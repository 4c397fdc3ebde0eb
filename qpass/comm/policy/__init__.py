"""Which collectives are compressed, as what, and when that pays."""
