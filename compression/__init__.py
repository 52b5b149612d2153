"""How values are stored: element formats and their exact byte counts."""
