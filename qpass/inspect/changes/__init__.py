"""What changed between two graphs: nodes, gathered into edits, and the diff that holds them."""
