"""A plan carried out on files: the experts it drops cut out, what it changes remade, the outcome verified, exported."""
