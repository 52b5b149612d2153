"""The tests, as a mirror of the packages; most run on random tiny models without a GPU."""
