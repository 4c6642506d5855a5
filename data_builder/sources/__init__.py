"""Where photos come from, and which part of each is used."""
