"""One kernel interface per module: numbers, structs, errno; no policy."""
