"""A model scores a set of pairs: for the audit and for certificates."""
