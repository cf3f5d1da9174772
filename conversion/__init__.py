"""Commands that turn official or trained weights into Hub repositories."""
