"""What goes where, decided before a byte is loaded. Knows no requests."""
