"""One command a file: parse, call one function, show a card or one JSON line. Heavy imports stay in the functions."""
