"""What the operations of dense networks mean on rows of sites."""
