"""Files: where a run may write, and how a file is replaced atomically."""
