"""How values are stored: element formats, their exact byte counts, and group quantization."""
