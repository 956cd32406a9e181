"""One HTML file on one or more runs."""
