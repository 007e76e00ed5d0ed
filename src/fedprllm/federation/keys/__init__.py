"""Keys and certificates: generated where they are used, signed by the federation's own authority."""
