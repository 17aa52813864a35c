"""A run directory as one HTML page: what was trained, what interrupted it, and where the time went."""
