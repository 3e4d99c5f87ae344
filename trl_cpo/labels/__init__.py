"""What the data says of a pair beside its order: how sure it is, by how much, and of which group."""
