"""One file per claim. `bash tests/run` runs all of it in a new environment."""
