"""Keys and certificates: made where they are used, signed by the federation's own authority."""
