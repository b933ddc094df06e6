"""All tables, plots and a gallery in one HTML file."""
